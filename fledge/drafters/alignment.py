"""Which row of a batch learns what: what a drafter's training tells the loss. Knows rows and positions, no network."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fledge.drafters.runs import QueryPlaces, Run

# P teacher positions, S active rows, R of them trained, K training steps of a row, M pairs


class PairChunk(NamedTuple):
    """Consecutive rows with all their pairs."""

    rows: slice  # of the R trained rows
    pairs: slice  # of the M pairs
    places: slice  # of the P positions: those of the pairs, and what lies between
    seen: int  # how many of these positions earlier chunks have had


@dataclass(frozen=True)
class Pairs:
    """All training pairs: M pairs of a TTT step and a teacher position, by row and then by step."""

    place: Tensor  # (M,) int64 index into the positions
    step: Tensor  # (M,) int64
    state: Tensor  # (M,) int64 row of the states of all steps, end to end
    row: Tensor  # (M,) int64 0 .. R - 1, ascending
    supervised: Tensor  # (K, R) bool: a teacher position has a pair with the row at this step, drawn or not
    ends: Sequence[int]  # R numbers: pairs of the rows up to each, itself included
    lowest: Sequence[int]  # R places, of each row's first pair
    highest: Sequence[int]  # R places, of each row's last pair

    def chunks(self, most: int, num_positions: int) -> Iterator[PairChunk]:
        """Chunks with at most so many pairs (at least one row); together they have every pair and every position."""
        if not self.ends and num_positions:
            yield PairChunk(slice(0, 0), slice(0, 0), slice(0, num_positions), 0)
        row = first = seen = 0
        while row < len(self.ends):
            end = max(row + 1, bisect_right(self.ends, first + most))
            last = self.ends[end - 1]
            begin = min(seen, *self.lowest[row:end])
            stop = num_positions if end == len(self.ends) else 1 + max(self.highest[row:end])
            yield PairChunk(slice(row, end), slice(first, last), slice(begin, stop), seen - begin)
            row, first, seen = end, last, max(seen, stop)


@dataclass(frozen=True)
class Alignment:
    """Which rows of a batch are trained, and by which teacher positions."""

    positions: Tensor  # (P,) int64 rows p whose target distribution teaches
    document: Tensor  # (P,) int64 document of each position
    num_documents: int
    rows: Tensor  # (S,) int64 rows that are trained at some step: ascending, or those unrolled to more steps first
    row_index: Tensor  # (K, P) int64 index into rows of row p - 1 - k; -1 where that is not trained
    supervised: Tensor  # (K, P) bool: row p - 1 - k is in p's document; random depths train some of them, `trained`
    share: Tensor  # (K,) probability of a supervised row to be trained
    runs: tuple[tuple[Run, ...], ...]  # K: the rows unrolled at each step, a prefix of `rows`, as contiguous runs;
    #                                    the last few may be there to fill up and are not trained
    last_row: Tensor  # (S,) int64 last row of each active row's document
    places: QueryPlaces | None  # the same rows as a GPU's attention asks for them
    pairs: Pairs

    @property
    def trained(self) -> Tensor:
        """(K, P) bool: position p teaches a row at step k."""
        return self.row_index >= 0

    @property
    def alive(self) -> list[int]:
        """K: how many of the rows are unrolled at each step."""
        return [sum(run.stop - run.start for run in runs) for runs in self.runs]
