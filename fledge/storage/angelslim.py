"""AngelSlim's folders of hidden states: one `.ckpt` per sample, and the draft vocabulary beside them.

A file is a `torch.save` dict: input_ids [1, N], loss_mask [1, N], hidden_states [1, N, 3H] (low, middle, high tap side
by side), target_hiddens [1, N, H] (after the final norm) and, for images, position_ids. Loaded with weights_only: a
file from elsewhere runs no code. Tokens and masks are mapped, so counting does not read the states.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.errors import UserError
from fledge.target.record import TargetRecord

# N tokens, A taps, H hidden

NEEDED = ("input_ids", "loss_mask", "hidden_states", "target_hiddens")
INTEGERS = (torch.int64, torch.int32)
VOCAB_FILE = "vocab_mapping.pt"


class AngelSlimFolder(Sequence[TargetRecord]):
    """Every `.ckpt` below a folder, in natural order of their names (rank_0/rows_0-5000/data_2 before data_10)."""

    def __init__(self, folder: Path, hidden_size: int, num_taps: int, *, max_length: int | None = None) -> None:
        self.folder, self.hidden_size, self.num_taps, self.max_length = folder, hidden_size, num_taps, max_length
        self.files = sorted(ckpt_files(folder), key=lambda path: _natural(path.relative_to(folder)))
        self.ids = [str(path.relative_to(folder).with_suffix("")) for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):  # type: ignore[override]
        path, rows = self.files[index], slice(self.max_length)
        saved = _load(path)
        length = saved["input_ids"].numel()
        taps = _states(saved, "hidden_states", length, self.num_taps * self.hidden_size, path)
        last = _states(saved, "target_hiddens", length, self.hidden_size, path)
        return TargetRecord(
            sample_id=self.ids[index],
            input_ids=saved["input_ids"].reshape(-1)[rows].long(),
            loss_mask=saved["loss_mask"].reshape(-1)[rows].bool(),
            position_ids=_positions(saved.get("position_ids"), length)[..., rows].contiguous(),
            tap_hidden=taps.view(length, self.num_taps, self.hidden_size)[rows].clone(),
            last_hidden=last[0, rows].clone(),
        )

    def counts(self, indices: Sequence[int], vocab_size: int) -> Tensor:
        """How often each token id is supervised in these files. (V,) int64."""
        total = torch.zeros(vocab_size, dtype=torch.int64)
        for index in indices:
            saved = _load(self.files[int(index)])
            ids, mask = saved["input_ids"].reshape(-1).long(), saved["loss_mask"].reshape(-1).bool()
            if int(ids.max()) >= vocab_size:
                raise UserError(
                    f"{self.files[int(index)]}: token id {int(ids.max())} is outside the target's vocabulary of "
                    f"{vocab_size}. Give the target the states were made with."
                )
            total += torch.bincount(ids[mask], minlength=vocab_size)
        return total


def ckpt_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.ckpt"))


def read_vocab_mapping(folder: Path, vocab_size: int) -> Tensor | None:
    """The target ids of the draft vocabulary beside the states, ascending; None without the file."""
    path = folder / VOCAB_FILE
    if not path.is_file():
        return None
    saved = _torch_load(path)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), Tensor) for name in ("d2t", "t2d")):
        raise UserError(f"{path}: expected tensors d2t and t2d. Delete it to have the vocabulary counted again.")
    d2t, t2d = saved["d2t"], saved["t2d"]
    check_vocab(d2t, t2d, str(path))
    if len(t2d) != vocab_size:
        raise UserError(f"{path}: made for a vocabulary of {len(t2d)}, the target has {vocab_size}. Delete the file.")
    return d2t.long() + torch.arange(len(d2t))


def _load(path: Path) -> dict[str, Tensor]:
    """A file whose tokens, mask and positions are sound; its states are looked at where they are read."""
    saved = _torch_load(path)
    missing = [name for name in NEEDED if not isinstance(saved, dict) or not isinstance(saved.get(name), Tensor)]
    if missing:
        raise UserError(f"{path}: no tensor {', '.join(missing)} in it; needed are {', '.join(NEEDED)}. Make it again.")
    if fault := _fault_of_tokens(saved["input_ids"], saved["loss_mask"], saved.get("position_ids")):
        raise UserError(f"{path}: {fault}. Make it again.")
    return saved


def _fault_of_tokens(ids: Tensor, mask: Tensor, positions: Any) -> str:
    """What is wrong with the tokens of a sample; nothing when they are sound."""
    length = ids.numel()
    if ids.dtype not in INTEGERS or not length or ids.shape[-1:] != (length,) or int(ids.min()) < 0:
        return f"input_ids is {ids.dtype} {tuple(ids.shape)}; needed are token ids (1, N), at least one"
    if mask.numel() != length or mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
        return f"loss_mask is {mask.dtype} {tuple(mask.shape)}; needed are {length} values, each 0 or 1"
    if positions is None:
        return ""
    if not isinstance(positions, Tensor):
        return f"position_ids is of type {type(positions).__name__}, needed is a tensor"
    if positions.dtype not in INTEGERS or positions.shape[-1:] != (length,) or int(positions.min()) < 0:
        return f"position_ids is {positions.dtype} {tuple(positions.shape)}; needed are positions (.., {length})"
    return ""


def _states(saved: dict[str, Tensor], name: str, length: int, width: int, path: Path) -> Tensor:
    """States of the right shape, all finite: one NaN would stop a run after hours."""
    states = saved[name]
    if tuple(states.shape) != (1, length, width):
        raise UserError(
            f"{path}: {name} is {tuple(states.shape)}, needed is (1, {length}, {width}) for this target. Give the "
            f"target and --tap_layers the states were made with."
        )
    if not states.is_floating_point() or not bool(states.isfinite().all()):
        raise UserError(f"{path}: {name} is {states.dtype}; needed are finite real numbers. Make the file again.")
    return states


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # truncated archives, pickled code, files of another kind: many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be loaded as plain tensors ({reason[0][:160]}). Make it again.") from None


def _positions(saved: Tensor | None, length: int) -> Tensor:
    """(N,) or (3, N), whatever batch dimension they were saved with."""
    if saved is None:
        return torch.arange(length)
    rows = saved.reshape(-1, length).long()
    return rows[0] if len(rows) == 1 else rows


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
