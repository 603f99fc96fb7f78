#!/usr/bin/env bash
# The same as train_eagle3_online.sh for a vision-language target: rows may show pictures (image parts in messages, or
# LLaVA's <image> marks), decoded by loader workers. All of its variables work here; these differ or are new.
set -euo pipefail

export TARGET_MODEL_NAME_OR_PATH=${TARGET_MODEL_NAME_OR_PATH:-Qwen/Qwen3-VL-4B-Instruct}
export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-4096}              # longest sample in tokens, those of pictures included
export MAX_PIXELS=${MAX_PIXELS:-}                              # area to which larger pictures are reduced
export MIN_PIXELS=${MIN_PIXELS:-}                              # area to which smaller pictures are enlarged
export NUM_WORKERS=${NUM_WORKERS:-4}                           # processes that read pictures ahead

exec bash "$(dirname "$0")/train_eagle3_online.sh" \
    --dataloader_num_workers "$NUM_WORKERS" \
    ${MAX_PIXELS:+--max_pixels "$MAX_PIXELS"} \
    ${MIN_PIXELS:+--min_pixels "$MIN_PIXELS"} \
    "$@"
