#!/usr/bin/env bash
# The same as train_eagle3_offline.sh with hidden states of a vision-language target
# (generate_vlm_hidden_for_draft_model.sh): pictures are hidden states by now, so nothing differs. With TRAIN_DATA_PATH
# set, what the store lacks of that data is extracted first, and these count.
set -euo pipefail

export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-4096}              # longer records are cut
export MAX_PIXELS=${MAX_PIXELS:-}                              # area to which larger pictures are reduced
export MIN_PIXELS=${MIN_PIXELS:-}                              # area to which smaller pictures are enlarged

exec bash "$(dirname "$0")/train_eagle3_offline.sh" \
    ${MAX_PIXELS:+--max_pixels "$MAX_PIXELS"} \
    ${MIN_PIXELS:+--min_pixels "$MIN_PIXELS"} \
    "$@"
