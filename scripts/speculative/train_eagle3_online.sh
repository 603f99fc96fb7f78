#!/usr/bin/env bash
# Train a draft head with the target in memory. Run it again to continue where it stopped. Further arguments go to
# fledge (and transformers' Trainer): bash scripts/speculative/train_eagle3_online.sh --learning_rate 2e-4
set -euo pipefail

export TARGET_MODEL_NAME_OR_PATH=${TARGET_MODEL_NAME_OR_PATH:-Qwen/Qwen3-4B}
export DRAFT_MODEL_CONFIG_PATH=${DRAFT_MODEL_CONFIG_PATH:-}    # empty: derived from the target
export TRAIN_DATA_PATH=${TRAIN_DATA_PATH:-outputs/regenerated} # files, folders or hub names, separated by spaces
export EVAL_DATA_PATH=${EVAL_DATA_PATH:-}                      # empty: --eval_fraction of the training data, if given
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/eagle3}
export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-2048}              # longest sample in tokens
export CHAT_TEMPLATE_TYPE=${CHAT_TEMPLATE_TYPE:-}              # empty: the tokenizer's own template
export RUN_NAME=${RUN_NAME:-}                                  # name of the run in wandb, tensorboard, ...
export NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-10}
export DEEPSPEED=${DEEPSPEED:-}                                # a DeepSpeed config; empty: plain data parallel
visible=$(command -v nvidia-smi > /dev/null && python3 -c 'import torch; print(torch.cuda.device_count())' || echo 1)
export NPROC_PER_NODE=${NPROC_PER_NODE:-$visible}            # processes, one per GPU

launch=(python3 -m fledge)
if [ "$NPROC_PER_NODE" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" -m fledge)
fi

# shellcheck disable=SC2086  (the data paths are lists of words)
exec "${launch[@]}" train \
    --target_model_name_or_path "$TARGET_MODEL_NAME_OR_PATH" \
    --train_data_path $TRAIN_DATA_PATH \
    --output_dir "$OUTPUT_DIR" \
    --model_max_length "$MODEL_MAX_LENGTH" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" \
    ${EVAL_DATA_PATH:+--eval_data_path $EVAL_DATA_PATH} \
    ${DRAFT_MODEL_CONFIG_PATH:+--draft_model_config_path "$DRAFT_MODEL_CONFIG_PATH"} \
    ${CHAT_TEMPLATE_TYPE:+--chat_template_type "$CHAT_TEMPLATE_TYPE"} \
    ${RUN_NAME:+--run_name "$RUN_NAME"} \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    "$@"
