"""What must hold before a checkpoint is continued: its whole state is there, and it learns from what it learned from.

The Trainer passes in silence over an optimizer, a schedule or a random state that is not there, and cannot know that
another target or other data lie under the same path. A run therefore leaves digests of both beside its head.
"""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from torch import Tensor

from fledge.errors import UserError
from fledge.outputs import write_json
from fledge.parsing import read_json

if TYPE_CHECKING:
    from fledge.train.sources import Source

INPUTS = "train_inputs.json"
VALUES = 256  # of every tensor: a fine-tune changes nearly all of them
# What a checkpoint needs beside its weights -> the files any of which is it
STATE = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),  # global_step*: DeepSpeed's folder, which holds both
    "random state": ("rng_state*.pth",),
}


class Inputs(msgspec.Struct):
    """What a run learns from, as digests."""

    target: str
    data: str


def check_resumable(checkpoint: Path) -> None:
    """Refuse a checkpoint from which a run would go on with a fresh optimizer, schedule or random state."""
    for what, patterns in STATE.items():
        files = [path for pattern in patterns for path in sorted(checkpoint.glob(pattern))]
        if not files:
            raise UserError(
                f"{checkpoint}: its {what} is missing ({' or '.join(patterns)}), so the run cannot go on as it was. "
                f"Give another checkpoint to --resume_from_checkpoint, or start from this one's head with --init-from."
            )
        if torn := next((path for path in files if path.is_file() and not zipfile.is_zipfile(path)), None):
            raise UserError(f"{torn}: cut or damaged. Give another checkpoint to --resume_from_checkpoint.")


def check_same_inputs(output_dir: Path, source: "Source", *, resuming: bool) -> None:
    """Write what this run learns from, or refuse to continue one that learned from something else."""
    path, now = output_dir / INPUTS, inputs_of(source)
    if resuming and path.is_file():
        before = read_json(path, Inputs, hint="Remove it to continue without this check.")
        for name, what in (("target", f"the target ({source.target_name})"), ("data", "the training data")):
            if getattr(before, name) != getattr(now, name):
                raise UserError(
                    f"{output_dir}: {what} is not what the run there was started with, though named alike. Put it back "
                    f"to continue, choose another --output_dir, or delete that run with --resume_from_checkpoint False "
                    f"--overwrite."
                )
    write_json(path, msgspec.structs.asdict(now))


def inputs_of(source: "Source") -> Inputs:
    """Of the target its two ends, and all its weights where they are in this process; of the data what it supervises,
    and the checksums of stored states."""
    ends = [("embedding", source.embedding), ("head", source.head_weight)]
    weights = source.target.model.named_parameters() if source.target is not None else ends
    data = hashlib.sha256(f"{len(source.train)} {source.states_digest} ".encode())
    data.update(source.counts.numpy().tobytes())
    return Inputs(target=weights_digest(weights), data=data.hexdigest())


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, shapes and a few values of each tensor: a second for a target of any size."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // VALUES)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
