"""Continuing a run: which checkpoint is complete, and whether the run in the folder is this one.

A checkpoint is complete when its trainer_state.json, which the Trainer writes last, parses. A run that was killed
while saving leaves an incomplete one; it is passed over for the one before, and removed when the run continues.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from fledge.console import say, warn
from fledge.errors import UserError
from fledge.parsing import read_json
from fledge.provenance import write_json
from fledge.redaction import redacted

CONFIG = "train_config.json"
# What may differ between a run and its continuation: where and how it is run and shown, not what is computed.
FREE = {
    "num_train_epochs", "max_steps", "output_dir", "logging_dir", "report_to", "run_name", "save_steps",
    "save_strategy", "save_total_limit", "logging_steps", "logging_strategy", "logging_first_step", "eval_steps",
    "eval_strategy", "resume_from_checkpoint", "dataloader_num_workers", "num_proc", "disable_tqdm", "log_level",
    "eval_data_path", "eval_hidden_path", "local_rank", "use_cpu", "save_dtype", "hub_token", "push_to_hub",
    "ddp_timeout", "dataloader_prefetch_factor", "dataloader_persistent_workers", "eval_on_start",
    "eval_decode_steps", "eval_decode_prompts", "eval_decode_max_new_tokens", "eval_decode_tree",
    "eval_decode_load_best", "activation_checkpointing", "gradient_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
}  # fmt: skip


def find_checkpoint(output_dir: Path, wanted: str | None) -> str | None:
    """The folder to resume from: an explicit one, the newest complete one for auto, None for a fresh start."""
    word = (wanted or "auto").lower()
    if word in ("false", "no", "none"):
        return None
    if word not in ("auto", "true", "yes"):
        if not is_complete(Path(str(wanted))):
            raise UserError(
                f"--resume_from_checkpoint {wanted}: no complete checkpoint there (trainer_state.json missing or cut). "
                f"Give another folder, or `auto` for the newest complete one."
            )
        return str(wanted)
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    folders.sort(key=lambda path: int(path.name.split("-")[-1]))
    while folders and not is_complete(folders[-1]):
        torn = folders.pop()
        warn(f"{torn}: incomplete checkpoint of a run that was killed while saving; removed.")
        shutil.rmtree(torn, ignore_errors=True)
    if not folders:
        return None
    say(f"resuming from {folders[-1]}")
    return str(folders[-1])


def is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "model.safetensors").is_file()


def check_same_run(output_dir: Path, resolved: dict[str, Any], resuming: bool) -> None:
    """Write the resolved config beside the run, or compare it with the run being continued."""
    path = output_dir / CONFIG
    if resuming and path.is_file():
        before = read_json(path, dict[str, Any], hint="Start over with --resume_from_checkpoint False.")
        plain = json.loads(json.dumps(redacted(resolved), default=str))
        for key, value in plain.items():
            if key not in FREE and key in before and before[key] != value:
                raise UserError(
                    f"{output_dir}: the run there has {key}={before[key]!r}, this one {value!r}. Continue with its "
                    f"settings, choose another --output_dir, or start over with --resume_from_checkpoint False."
                )
    write_json(path, resolved)
