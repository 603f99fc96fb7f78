"""Continuing a run: whose the folder is, which checkpoint is complete, and whether the run there is this one.

A checkpoint is complete when its trainer_state.json, which the Trainer writes last, names a step. A run that was killed
while saving leaves an incomplete one; it is passed over for the one before, and removed when the run continues. Every
checkpoint carries the marker of its run: only those are resumed from and deleted.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from fledge.console import warn
from fledge.drafters.head_files import WEIGHTS
from fledge.errors import UserError
from fledge.outputs import (
    MARKER,
    Claim,
    Output,
    check,
    claim,
    delete,
    document_has,
    in_full,
    is_own,
    mark,
    owner,
    write_json,
)
from fledge.parsing import read_json, read_python_json
from fledge.ranges import Natural
from fledge.redaction import redacted
from fledge.train.continuation import INPUTS

CONFIG, BEST = "train_config.json", "best"
TRAIN = Output(
    "train",
    ("config.json", WEIGHTS, "checkpoint-*", BEST, CONFIG, INPUTS, "trainer_state.json", "provenance.json"),
    lambda folder: document_has(folder / CONFIG, "output_dir", "ttt_steps"),
)
# What may differ between a run and its continuation: where and how it is run and shown, not what is computed.
FREE = {
    "num_train_epochs", "max_steps", "output_dir", "logging_dir", "report_to", "run_name", "save_steps",
    "save_strategy", "save_total_limit", "logging_steps", "logging_strategy", "logging_first_step", "eval_steps",
    "eval_strategy", "resume_from_checkpoint", "dataloader_num_workers", "num_proc", "disable_tqdm", "log_level",
    "eval_data", "eval_states", "local_rank", "use_cpu", "save_dtype", "hub_token", "push_to_hub",
    "ddp_timeout", "dataloader_prefetch_factor", "dataloader_persistent_workers", "eval_on_start",
    "eval_decode_steps", "eval_decode_prompts",
    "eval_decode_load_best", "activation_checkpointing", "gradient_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "overwrite", "verbose",
}  # fmt: skip

DERIVED = {"tap_layers", "draft_layers", "block_size", "dtype"}  # earlier versions wrote them as they were given


class SavedState(msgspec.Struct):
    """trainer_state.json, as far as it is looked at here."""

    global_step: Natural


def check_start(output_dir: Path, wanted: str | None, overwrite: bool) -> None:
    """Refuse a folder of others, and an earlier run that is neither continued nor to be deleted. Touches nothing."""
    check(output_dir, TRAIN, overwrite=overwrite)
    checkpoint = find_checkpoint(output_dir, wanted)
    if overwrite or not is_own(output_dir, TRAIN):
        return
    if strange := [path.name for path in checkpoints(output_dir) if not (own(path) or _is_bare(path))]:
        raise UserError(
            f"{output_dir}: {', '.join(strange[:4])} is not of the run in this folder. Move it elsewhere, or give "
            f"--overwrite to have it deleted."
        )
    if not _is_inside(checkpoint, output_dir) and (left := _earlier_work(output_dir)):
        raise UserError(
            f"{output_dir}: holds {', '.join(path.name for path in left[:4])} of an earlier run that this one does not "
            f"continue. Choose another --output_dir, or give --overwrite to have them deleted."
        )


def begin(output_dir: Path, wanted: str | None, overwrite: bool) -> Claim:
    """Lock and mark the folder; delete what no checkpoint can be resumed from, and with --overwrite what is in the way.

    One process calls it. Checkpoints written before fledge left markers are marked as this run's.
    """
    check_start(output_dir, wanted, overwrite)
    unmarked = [path for path in checkpoints(output_dir) if own(path)] if is_own(output_dir, TRAIN) else []
    held = claim(output_dir, TRAIN, overwrite=overwrite)
    try:
        for path in unmarked:
            mark(path, TRAIN, held.run)
        if not _is_inside(find_checkpoint(output_dir, wanted), output_dir):
            delete([*_earlier_work(output_dir), *([output_dir / BEST] if (output_dir / BEST).is_dir() else [])])
        for path in checkpoints(output_dir):
            if _is_bare(path) or (own(path) and not is_complete(path)):
                warn(f"{path}: incomplete checkpoint of a run that was killed while saving; removed.")
                delete([path])
            elif not own(path):
                delete([path])  # --overwrite: `check_start` refuses it without
    except BaseException:
        held.release()
        raise
    return held


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
    complete = [path for path in checkpoints(output_dir) if own(path) and is_complete(path)]
    return str(complete[-1]) if complete else None


def checkpoints(output_dir: Path) -> list[Path]:
    """Everything named like a checkpoint, by step."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def own(checkpoint: Path) -> bool:
    """Whether the run of the folder around wrote this checkpoint. Before there were markers, its config says so."""
    run, its = owner(checkpoint.parent, TRAIN.command), owner(checkpoint, TRAIN.command)
    if its is not None:
        return its.run == (run.run if run else "")
    return run is None and document_has(checkpoint / "config.json", "fledge")


def delete_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep this run's newest `limit` checkpoints, and the best. The Trainer's own rotation deletes any folder."""
    mine = [path for path in checkpoints(output_dir) if own(path)]
    if not limit or limit < 0 or not mine:
        return
    kept = {mine[-1].name, *([Path(best).name] if best else [])}
    excess = len(mine) - max(limit, len(kept))
    delete([path for path in mine if path.name not in kept][: max(excess, 0)])


def _earlier_work(output_dir: Path) -> list[Path]:
    """What a run has to show: a final head, checkpoints to resume from."""
    heads = [output_dir / WEIGHTS] if (output_dir / WEIGHTS).is_file() else []
    return heads + [path for path in checkpoints(output_dir) if own(path) and is_complete(path)]


def _is_inside(checkpoint: str | None, output_dir: Path) -> bool:
    return checkpoint is not None and Path(checkpoint).resolve().parent == output_dir.resolve()


def _is_bare(checkpoint: Path) -> bool:
    """Made by a process that was killed before it wrote anything."""
    return checkpoint.is_dir() and all(path.name.startswith(MARKER) for path in checkpoint.iterdir())


def is_complete(folder: Path) -> bool:
    """Whether the last file that the Trainer writes is whole, and the weights are there."""
    try:
        read_python_json(folder / "trainer_state.json", SavedState)
    except UserError:
        return False
    return (folder / WEIGHTS).is_file()


def check_same_run(output_dir: Path, resolved: dict[str, Any], resuming: bool) -> None:
    """Write the resolved config beside the run, or compare it with the run being continued."""
    path = output_dir / CONFIG
    if resuming and path.is_file():
        before = read_json(path, dict[str, Any], hint="Start over with --resume_from_checkpoint False --overwrite.")
        plain = json.loads(json.dumps(redacted(resolved), default=str))
        for key, value in plain.items():
            derived = key in DERIVED and before.get(key) in (None, [], "auto")
            if key not in FREE and key in before and in_full(before[key]) != in_full(value) and not derived:
                raise UserError(
                    f"{output_dir}: the run there has {key}={before[key]!r}, this one {value!r}. Continue with its "
                    f"settings, choose another --output_dir, or delete that run with --resume_from_checkpoint False "
                    f"--overwrite."
                )
    write_json(path, resolved)
