"""Sequence parallelism: the rows of a sequence are unrolled by several processes, each its share of them.

Every process of a group is given the same batch. Step-0 keys and values of all rows are made by each of them, as those
of a prompt are, and nothing is sent between forward and backward. What the rows of the others cost is not paid: their
states of all TTT steps, which are most of a step's memory and work. Losses are sums over rows, so the sum of the
processes' gradients is the gradient of the whole sequence, and that sum is taken for the weights anyway.

    a run of 8 rows in pieces of 2, two processes    rows    0 1 | 2 3 | 4 5 | 6 7
                                                     process  0     1     0     1
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.drafters.runs import Run

Piece = tuple[Run, int]  # rows, and the steps they are unrolled


@dataclass(frozen=True)
class Share:
    """The share of one process."""

    index: int
    count: int
    """Processes that share the rows of a sequence."""

    def of(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Every `count`-th piece: later rows see more keys, and pieces are ordered by depth, so a stretch of neighbours
        would be more or less work than another."""
        return list(pieces[self.index :: self.count])
