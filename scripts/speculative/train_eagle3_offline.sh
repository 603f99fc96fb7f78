#!/usr/bin/env bash
# Train a draft head from stored hidden states (generate_hidden_for_draft_model.sh); the target is not loaded. Run it
# again to continue where it stopped. With TRAIN_DATA_PATH set, what the store lacks of that data is extracted first.
# Further arguments go to fledge (and transformers' Trainer).
set -euo pipefail

export TARGET_MODEL_NAME_OR_PATH=${TARGET_MODEL_NAME_OR_PATH:-} # empty: as the store says; needed for .ckpt folders
export DRAFT_MODEL_CONFIG_PATH=${DRAFT_MODEL_CONFIG_PATH:-}    # empty: derived from the target
export TRAIN_DATA_PATH=${TRAIN_DATA_PATH:-}                    # empty: everything in TRAIN_HIDDEN_PATH
export EVAL_DATA_PATH=${EVAL_DATA_PATH:-}
export TRAIN_HIDDEN_PATH=${TRAIN_HIDDEN_PATH:-outputs/hidden}  # stores, separated by spaces
export EVAL_HIDDEN_PATH=${EVAL_HIDDEN_PATH:-}                  # empty: --eval_fraction of the training data, if given
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/eagle3}
export MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-2048}              # longer records are cut
export CHAT_TEMPLATE_TYPE=${CHAT_TEMPLATE_TYPE:-}              # empty: the one the states were made with
export LM_HEAD_KEY=${LM_HEAD_KEY:-}                            # empty: as the store or the target says
export RUN_NAME=${RUN_NAME:-}                                  # name of the run in wandb, tensorboard, ...
export NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-10}
export NUM_WORKERS=${NUM_WORKERS:-2}                           # processes that read records ahead
export DEEPSPEED=${DEEPSPEED:-}                                # a DeepSpeed config; empty: plain data parallel
visible=$(command -v nvidia-smi > /dev/null && python3 -c 'import torch; print(torch.cuda.device_count())' || echo 1)
export NPROC_PER_NODE=${NPROC_PER_NODE:-$visible}            # processes, one per GPU

launch=(python3 -m fledge)
if [ "$NPROC_PER_NODE" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" -m fledge)
fi

# shellcheck disable=SC2086  (the paths are lists of words)
exec "${launch[@]}" train \
    --train_hidden_path $TRAIN_HIDDEN_PATH \
    --output_dir "$OUTPUT_DIR" \
    --model_max_length "$MODEL_MAX_LENGTH" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" \
    --dataloader_num_workers "$NUM_WORKERS" \
    ${EVAL_HIDDEN_PATH:+--eval_hidden_path $EVAL_HIDDEN_PATH} \
    ${TRAIN_DATA_PATH:+--train_data_path $TRAIN_DATA_PATH} \
    ${EVAL_DATA_PATH:+--eval_data_path $EVAL_DATA_PATH} \
    ${TARGET_MODEL_NAME_OR_PATH:+--target_model_name_or_path "$TARGET_MODEL_NAME_OR_PATH"} \
    ${DRAFT_MODEL_CONFIG_PATH:+--draft_model_config_path "$DRAFT_MODEL_CONFIG_PATH"} \
    ${CHAT_TEMPLATE_TYPE:+--chat_template_type "$CHAT_TEMPLATE_TYPE"} \
    ${LM_HEAD_KEY:+--lm_head_key "$LM_HEAD_KEY"} \
    ${RUN_NAME:+--run_name "$RUN_NAME"} \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    "$@"
