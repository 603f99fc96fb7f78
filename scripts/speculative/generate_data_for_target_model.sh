#!/usr/bin/env bash
# Let the target answer every conversation again: the training data of the draft head. Needs running servers
# (run_vllm_server.sh), or ENGINE=transformers and MODEL_NAME. Run it again to continue where it stopped.
# Further arguments go to fledge: bash scripts/speculative/generate_data_for_target_model.sh --deduplicate
set -euo pipefail

export DATA_NAME_OR_PATH=${DATA_NAME_OR_PATH:-HuggingFaceH4/ultrachat_200k}   # hub name, file or folder
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/regenerated}
export DATA_FORMAT=${DATA_FORMAT:-auto}                 # sharegpt, ultrachat, messages, or auto
export DATA_SHARD_SIZE=${DATA_SHARD_SIZE:-50000}        # input rows per output file
export BASE_PORT=${BASE_PORT:-6000}                     # ports BASE_PORT .. BASE_PORT + MAX_CLIENTS - 1 are tried
export MAX_CLIENTS=${MAX_CLIENTS:-8}
export ENDPOINTS=${ENDPOINTS:-}                         # instead of ports: "host1:6000 https://host2/v1"
export API_KEY_ENV=${API_KEY_ENV:-}                     # name of the variable that holds the servers' key
export NUM_THREADS=${NUM_THREADS:-256}                  # requests in flight over all servers
export MAX_TOKENS=${MAX_TOKENS:-2048}                   # longest answer
export TEMPERATURE=${TEMPERATURE:-0.7}                  # or a mixture: 0.0:0.3,0.7:0.7
export TOP_P=${TOP_P:-1.0}
export SEED=${SEED:-42}
export THINKING=${THINKING:-default}                    # on, off, both (half and half) or default
export SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                 # for conversations without one
export ENGINE=${ENGINE:-openai}                         # or transformers: in this process, no server
export MODEL_NAME=${MODEL_NAME:-}                       # empty: what the servers serve
export SPLIT=${SPLIT:-}                                 # split of a hub data set; empty: train (ultrachat_200k: train_sft)

if [ -z "$SPLIT" ] && [ "$DATA_NAME_OR_PATH" = HuggingFaceH4/ultrachat_200k ]; then
    SPLIT=train_sft # it has no split named train
fi

# shellcheck disable=SC2086  (ENDPOINTS is a list of words)
exec python3 -m fledge regenerate \
    --data-name-or-path "$DATA_NAME_OR_PATH" \
    --output-dir "$OUTPUT_DIR" \
    --data-format "$DATA_FORMAT" \
    --data-shard-size "$DATA_SHARD_SIZE" \
    --base-port "$BASE_PORT" \
    --max-clients "$MAX_CLIENTS" \
    --num-threads "$NUM_THREADS" \
    --max-new-tokens "$MAX_TOKENS" \
    --temperature "$TEMPERATURE" \
    --top-p "$TOP_P" \
    --seed "$SEED" \
    --thinking "$THINKING" \
    --engine "$ENGINE" \
    ${ENDPOINTS:+--server $ENDPOINTS} \
    ${API_KEY_ENV:+--api-key-env "$API_KEY_ENV"} \
    ${SYSTEM_PROMPT:+--system "$SYSTEM_PROMPT"} \
    ${MODEL_NAME:+--model "$MODEL_NAME"} \
    ${SPLIT:+--split "$SPLIT"} \
    "$@"
