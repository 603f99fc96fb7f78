"""Stored records as a dataset: parts of stores in a fixed order, for loader workers to read and the sampler to mix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fledge.console import warn
from fledge.data.dataset import hash_share
from fledge.data.samples import conversation_id
from fledge.errors import UserError
from fledge.target.record import TargetRecord


@dataclass(frozen=True)
class Part:
    """Some records of one store, in the order they are trained in."""

    store: Any  # a sequence of records with ids
    rows: np.ndarray

    @classmethod
    def whole(cls, store: Any) -> "Part":
        return cls(store, np.arange(len(store)))

    @property
    def ids(self) -> list[str]:
        return [self.store.ids[row] for row in self.rows]


class Records(Dataset[TargetRecord]):
    """Records of several parts, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part.rows) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> TargetRecord:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        begin = int(self._ends[number]) - len(part.rows)
        return part.store[int(part.rows[index - begin])]


def as_it_is(record: TargetRecord) -> TargetRecord:
    """A stored record needs no making."""
    return record


def by_id(stores: Sequence[Any], ids: Sequence[str]) -> list[Part]:
    """Records with these ids, in this order, from whichever store has them."""
    place: dict[str, tuple[int, int]] = {}
    for number, store in reversed(list(enumerate(stores))):
        place |= {id: (number, row) for row, id in enumerate(store.ids)}
    found = [place[id] for id in ids]
    parts: list[Part] = []
    begin = 0
    for end in range(1, len(found) + 1):  # runs of the same store
        if end == len(found) or found[end][0] != found[begin][0]:
            parts.append(Part(stores[found[begin][0]], np.array([row for _, row in found[begin:end]])))
            begin = end
    return parts


def without(stores: Sequence[Any], ids: Sequence[str]) -> list[Part]:
    """All records of the stores but those of the conversations that these samples are from."""
    out = {conversation_id(id) for id in ids}
    kept = [np.array([row for row, id in enumerate(store.ids) if conversation_id(id) not in out]) for store in stores]
    return [Part(store, rows) for store, rows in zip(stores, kept, strict=True) if len(rows)]


def warn_of_shared(train_ids: Iterable[str], held_out_ids: Iterable[str]) -> None:
    """Say it when conversations are trained on and held out: what is measured on them is memory."""
    held_out = {conversation_id(id) for id in held_out_ids}
    shared = sorted(held_out.intersection(map(conversation_id, train_ids if held_out else ())))
    if shared:
        warn(
            f"{len(shared)} of {len(held_out)} held-out conversations have the id of one that is trained on "
            f"({', '.join(shared[:3])}{', ...' if shared[3:] else ''}). If they are the same, the evaluation flatters."
        )


def split(parts: Sequence[Part], eval_fraction: float) -> tuple[list[Part], list[Part]]:
    """(train, eval) by a hash of the conversation's id: the same split as in online training."""
    train, held_out = [], []
    for part in parts:
        out = np.array([hash_share(conversation_id(id), 0) < eval_fraction for id in part.ids], dtype=bool)
        if out.all() or not out.any():
            raise UserError(
                f"--eval-fraction {eval_fraction} of {len(out)} records leaves {int(out.sum())} for evaluation and "
                f"{int((~out).sum())} for training. Store more, or choose another fraction."
            )
        train.append(Part(part.store, part.rows[~out]))
        held_out.append(Part(part.store, part.rows[out]))
    return train, held_out
