#!/usr/bin/env bash
# Store the target's hidden states for a data set, so that training needs no target. Run it again to continue where it
# stopped, or with more data to add to the store. Further arguments go to fledge:
# bash scripts/speculative/generate_hidden_for_draft_model.sh --tap-storage fp8
set -euo pipefail

export DATASET_PATH=${DATASET_PATH:-outputs/regenerated}       # files, folders or hub names, separated by spaces
export MODEL_NAME=${MODEL_NAME:-Qwen/Qwen3-4B}                 # the target: a folder or a name on the hub
export TARGET_BACKEND=${TARGET_BACKEND:-hf}                    # hf, or vllm (needs SERVER)
export SERVER=${SERVER:-}                                      # vllm: base URLs, separated by spaces
export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-2048}              # longest sample in tokens
export CHAT_TEMPLATE_TYPE=${CHAT_TEMPLATE_TYPE:-}              # empty: the tokenizer's own template
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/hidden}                # the store
visible=$(command -v nvidia-smi > /dev/null && python3 -c 'import torch; print(torch.cuda.device_count())' || echo 1)
export NPROC_PER_NODE=${NPROC_PER_NODE:-$visible}            # processes, one per GPU

launch=(python3 -m fledge)
if [ "$NPROC_PER_NODE" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" -m fledge)
fi

# shellcheck disable=SC2086  (DATASET_PATH and SERVER are lists of words)
exec "${launch[@]}" extract \
    --dataset-path $DATASET_PATH \
    --model-name "$MODEL_NAME" \
    --target-backend "$TARGET_BACKEND" \
    --model-max-length "$MODEL_MAX_LENGTH" \
    --output-dir "$OUTPUT_DIR" \
    ${SERVER:+--server $SERVER} \
    ${CHAT_TEMPLATE_TYPE:+--chat-template-type "$CHAT_TEMPLATE_TYPE"} \
    "$@"
