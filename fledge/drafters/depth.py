"""How deep rows are unrolled: all of them to the last TTT step, or each to a random depth.

The loss of step k counts 0.8 ** k or less, yet step k costs as much as step 0. With `survival` s, a row goes on from
one step to the next with probability s, and its loss at step k is weighted by 1 / s ** k. The gradient of every row is
then right in expectation, and K steps cost 1 + s + .. + s ** (K - 1) of one: 3.95 of 7 at s = 0.8. (Dynamic
`position_weights` depend on the draft's confidence at later steps and have to guess what is left out.) The later steps
of a row read its own keys and those of step 0, which every row has. So rows that stop change nothing for the others.

Rows stop in pieces of neighbours, so that their attention stays a few blocks. Pieces are ordered by depth, the deepest
first, so the rows of every step are a prefix:

    a run of 8 rows, pieces of 2, depths 1 4 2 3      rows    2 3 | 6 7 | 4 5 | 0 1
                                                      step 0  . .   . .   . .   . .
                                                      step 1  . .   . .   . .
                                                      step 2  . .   . .
                                                      step 3  . .

The rows of a step are rounded up (`cpu_kernels.round_up`) with rows of the next piece.

A document's depths depend on its id, the seed and the step, not on the other documents of the batch or on the rank.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fledge.drafters.cpu_kernels import round_up
from fledge.drafters.runs import Run

SMALLEST_PIECE = 32  # rows
PIECES_OF_A_RUN = 16  # at most; more would cost attention more calls than they even out


@dataclass(frozen=True)
class RandomDepth:
    """A draw for every piece of every document."""

    survival: float  # probability of a row to go on to the next step
    seed: tuple[int, int]  # of the run, and the number of the optimisation step

    def expected(self, ttt_steps: int) -> list[float]:
        """(K,) probability of a row to be unrolled at step k."""
        return [self.survival**step for step in range(ttt_steps)]

    def pieces(self, runs: Sequence[Run], sample_ids: Mapping[int, str], ttt_steps: int) -> list[tuple[Run, int]]:
        """The runs in pieces, each with its number of steps, deepest first. `sample_ids` by a document's first row."""
        documents: dict[int, list[Run]] = {}
        for run in runs:
            documents.setdefault(run.first, []).extend(pieces_of(run))
        found: list[tuple[Run, int]] = []
        for first, pieces in documents.items():
            found += zip(pieces, self.draw(sample_ids[first], len(pieces), ttt_steps), strict=True)
        return sorted(found, key=lambda piece: -piece[1])

    def draw(self, sample_id: str, number: int, ttt_steps: int) -> list[int]:
        """Depths of a document's pieces, 1 to K each: stratified, so that few pieces have even shares of all depths."""
        chance = np.random.default_rng([*self.seed, zlib.crc32(sample_id.encode())])
        strata = (chance.permutation(number) + chance.random()) / number  # each uniform in [0, 1)
        return [min(ttt_steps, 1 + math.floor(math.log(max(u, 1e-12)) / math.log(self.survival))) for u in strata]


def num_rows(pieces: Sequence[tuple[Run, int]], ttt_steps: int) -> list[int]:
    """(K,) rows of the pieces that go as far as each step."""
    return [sum(run.stop - run.start for run, steps in pieces if steps > step) for step in range(ttt_steps)]


def unrolled(pieces: Sequence[tuple[Run, int]], ttt_steps: int) -> tuple[tuple[Run, ...], ...]:
    """The runs of each step: the pieces that go as far, and so many rows of the next ones that the sum is round."""
    found = []
    for rows in num_rows(pieces, ttt_steps):
        runs, left = [], round_up(rows)
        for run, _ in pieces:
            if left > 0:
                runs.append(Run(run.first, run.start, min(run.stop, run.start + left)))
                left -= run.stop - run.start
        found.append(tuple(runs))
    return tuple(found)


def pieces_of(run: Run) -> list[Run]:
    """A run in pieces of equal size (the last may be short)."""
    size = max(SMALLEST_PIECE, math.ceil((run.stop - run.start) / PIECES_OF_A_RUN))
    starts = range(run.start, run.stop, size)
    return [Run(run.first, start, min(start + size, run.stop)) for start in starts]
