#!/usr/bin/env bash
# Start one vLLM server of the target per GPU group; waits until all answer, stops them all on Ctrl-C.
# Further arguments go to vLLM: bash scripts/speculative/run_vllm_server.sh --gpu-memory-utilization 0.8
set -euo pipefail

export MODEL_NAME=${MODEL_NAME:-Qwen/Qwen3-4B}          # the target: a folder or a name on the hub
export BASE_PORT=${BASE_PORT:-6000}                     # server i listens on BASE_PORT + i
export TP_SIZE=${TP_SIZE:-1}                            # GPUs per server
export NUM_SERVERS=${NUM_SERVERS:-}                     # empty: as many as the GPUs allow
export HOST=${HOST:-127.0.0.1}                          # 0.0.0.0 lets other machines in
export MAX_MODEL_LEN=${MAX_MODEL_LEN:-}                 # empty: what the model allows
export LOG_DIR=${LOG_DIR:-outputs/serve}                # one log per server
export DRAFT=${DRAFT:-}                                 # an EAGLE-3 head to decode with; empty: none
export NUM_SPECULATIVE_TOKENS=${NUM_SPECULATIVE_TOKENS:-3}
export VLLM=${VLLM:-vllm}                               # the vllm program, in whichever virtual environment

exec python3 -m fledge serve \
    --model-name-or-path "$MODEL_NAME" \
    --base-port "$BASE_PORT" \
    --tensor-parallel-size "$TP_SIZE" \
    --host "$HOST" \
    --output-dir "$LOG_DIR" \
    --num-speculative-tokens "$NUM_SPECULATIVE_TOKENS" \
    --vllm "$VLLM" \
    ${NUM_SERVERS:+--num-servers "$NUM_SERVERS"} \
    ${MAX_MODEL_LEN:+--max-model-len "$MAX_MODEL_LEN"} \
    ${DRAFT:+--draft "$DRAFT"} \
    ${PRINT:+--print} \
    -- "$@"
