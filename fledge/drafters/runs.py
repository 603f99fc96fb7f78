"""Contiguous runs of rows: what attention is asked for, cut at documents."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Query rows [start, stop) of the flat batch, in the document whose first row is `first`."""

    first: int
    start: int
    stop: int


def runs_of(active: Tensor, lengths: Sequence[int]) -> tuple[Run, ...]:
    """Contiguous runs of True in `active` (N,), cut at document boundaries.

    active = 0 1 1 | 1 0 1, lengths = (3, 3)  ->  [1, 3) of the first document, [3, 4) and [5, 6) of the second
    """
    runs, first = [], 0
    flags = active.tolist()
    for length in lengths:
        start = None
        for row in range(first, first + length + 1):
            inside = row < first + length and flags[row]
            if inside and start is None:
                start = row
            elif not inside and start is not None:
                runs.append(Run(first, start, row))
                start = None
        first += length
    return tuple(runs)
