"""Names of AngelSlim, of the Trainer and of earlier versions, and what they are called here.

One table for all commands and recipes: a name is translated where the command has no flag of that name but has the
other one. docs/migration-from-angelslim.md explains them; `--help` does not list them.
"""

from collections.abc import Collection

ALIASES = {
    "base_model_path": "target",
    "model_name": "target",
    "model_name_or_path": "target",
    "target_model_name_or_path": "target",
    "tokenizer": "target",
    "eagle_model_path": "draft",
    "data_name_or_path": "data",
    "dataset_path": "data",
    "train_data_path": "data",
    "eval_data_path": "eval_data",
    "train_hidden_path": "states",
    "eval_hidden_path": "eval_states",
    "data_split": "split",
    "target_dtype": "dtype",
    "draft_model_config_path": "draft_config",
    "max_new_token": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "system_prompt": "system",
    "endpoints": "server",
    "log_dir": "output_dir",
    "work_dir": "output_dir",
    "epochs": "num_train_epochs",
    "num_prompts": "max_samples",
    "num_questions": "question_end",
    "gpus_per_worker": "num_gpus_per_model",
    "num_gpus": "num_gpus_total",
}


def translated(name: str, known: Collection[str]) -> str:
    """The name of a flag among `known` that this name means; unchanged where there is none."""
    other = ALIASES.get(name)
    return other if other is not None and name not in known and other in known else name
