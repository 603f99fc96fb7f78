#!/usr/bin/env bash
# The same as generate_hidden_for_draft_model.sh for a vision-language target: rows may show pictures (image parts in
# messages, or LLaVA's <image> marks). All of its variables work here; these differ or are new.
set -euo pipefail

export MODEL_NAME=${MODEL_NAME:-Qwen/Qwen3-VL-4B-Instruct}     # the target: a folder or a name on the hub
export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-4096}              # longest sample in tokens, those of pictures included
export MAX_PIXELS=${MAX_PIXELS:-}                              # area to which larger pictures are reduced
export MIN_PIXELS=${MIN_PIXELS:-}                              # area to which smaller pictures are enlarged
export NUM_PROC=${NUM_PROC:-4}                                 # processes that tokenise, threads that read pictures

exec bash "$(dirname "$0")/generate_hidden_for_draft_model.sh" \
    --num-proc "$NUM_PROC" \
    ${MAX_PIXELS:+--max-pixels "$MAX_PIXELS"} \
    ${MIN_PIXELS:+--min-pixels "$MIN_PIXELS"} \
    "$@"
