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
        length = saved["input_ids"].shape[-1]
        taps, last = saved["hidden_states"], saved["target_hiddens"]
        wanted = {"hidden_states": self.num_taps * self.hidden_size, "target_hiddens": self.hidden_size}
        for name, width in wanted.items():
            if tuple(saved[name].shape) != (1, length, width):
                raise UserError(
                    f"{path}: {name} is {tuple(saved[name].shape)}, needed is (1, {length}, {width}) for this target. "
                    f"Give the target and --tap_layers the states were made with."
                )
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
            ids = saved["input_ids"].reshape(-1)[saved["loss_mask"].reshape(-1).bool()].long()
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise UserError(
                    f"{self.files[int(index)]}: token id {int(ids.max())} is outside the target's vocabulary of "
                    f"{vocab_size}. Give the target the states were made with."
                )
            total += torch.bincount(ids, minlength=vocab_size)
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
    d2t, t2d = saved["d2t"].long(), saved["t2d"].bool()
    check_vocab(d2t, t2d, str(path))
    if len(t2d) != vocab_size:
        raise UserError(f"{path}: made for a vocabulary of {len(t2d)}, the target has {vocab_size}. Delete the file.")
    return d2t + torch.arange(len(d2t))


def _load(path: Path) -> dict[str, Tensor]:
    saved = _torch_load(path)
    missing = [name for name in NEEDED if not isinstance(saved, dict) or not isinstance(saved.get(name), Tensor)]
    if missing:
        raise UserError(f"{path}: no tensor {', '.join(missing)} in it; needed are {', '.join(NEEDED)}. Make it again.")
    return saved


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
