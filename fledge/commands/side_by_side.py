"""The same answer twice, side by side as it streams: plain decoding, and decoding with a draft head.

There is one machine for both. Whichever side has computed for the shorter time goes on, so each has half of the machine
and the columns grow in the proportion of their speeds.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fledge.console import console
from fledge.data.detokenize import Detokenizer
from fledge.escaping import printable

if TYPE_CHECKING:  # they import torch, which `--help` has no time for
    from fledge.drafters.base import Drafter
    from fledge.target.model import Target

TITLES = ("plain decoding", "with the draft head")
REDRAWN_S = 0.05


class Asked(Protocol):
    """What is asked, as `fledge.load` returns it."""

    target: "Target"
    drafter: "Drafter | None"


@dataclass
class Column:
    """An answer as it grows."""

    title: str
    detokenizer: Detokenizer
    rounds: Iterator[list[list[int]]]
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # of the pieces
    pieces: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of computing; the prompt's is not counted in the speed
    prompt_s: float = 0.0
    first: int = 0  # tokens that came with the prompt's forward
    ended: bool = False

    def advance(self) -> None:
        """One round."""
        start = time.perf_counter()
        new = next(self.rounds, None)
        self.seconds += time.perf_counter() - start
        if new is None:
            self.ended = True
            self._add(self.detokenizer.rest(), drafted=False)
            return
        if not self.token_ids:
            self.prompt_s, self.first = self.seconds, len(new[0])
        self.token_ids += new[0]
        for index, token in enumerate(new[0]):
            self._add(self.detokenizer.add(token), drafted=index < len(new[0]) - 1)

    @property
    def tokens_per_s(self) -> float:
        """Behind the prompt; 0 before there is anything to count."""
        spent = self.seconds - self.prompt_s
        return (len(self.token_ids) - self.first) / spent if spent > 0 else 0.0

    def _add(self, piece: str, *, drafted: bool) -> None:
        if piece:
            self.pieces.append(piece)
            self.drafted.append(drafted)

    def text(self) -> Text:
        """What there is, drafted tokens green."""
        pairs = zip(self.pieces, self.drafted, strict=True)
        return Text.assemble(*((printable(piece), "green" if drafted else "") for piece, drafted in pairs))


def side_by_side(
    pair: Asked, prompt: Sequence[int], stops: Sequence[int], max_new_tokens: int
) -> tuple[Column, Column]:  # fmt: skip
    """Both answers to a prompt: on a terminal as they stream, in a log the text once."""
    _both(pair, prompt, stops, 8, show=False)  # the first rounds of a process are slow; neither side should pay for it
    plain, speculative = _both(pair, prompt, stops, max_new_tokens, show=console.is_interactive)
    if not console.is_interactive:
        console.print(speculative.text())
    return plain, speculative


def _both(pair: Asked, prompt: Sequence[int], stops: Sequence[int], most: int, *, show: bool) -> tuple[Column, Column]:
    from fledge.decoding.default_tree import drafting
    from fledge.decoding.generate import stream

    def side(title: str, drafter: "Drafter | None") -> Column:
        options: dict[str, Any] = {"max_new_tokens": most, "eos_token_ids": tuple(stops)}
        rounds = stream(pair.target, drafter, [prompt], **options, **drafting(pair.target, drafter, None))
        return Column(title, Detokenizer(pair.target.tokenizer), rounds)

    sides = side(TITLES[0], None), side(TITLES[1], pair.drafter)
    with _screen(sides) if show else _dark() as redraw:
        while going := [one for one in sides if not one.ended]:
            min(going, key=lambda one: one.seconds).advance()
            redraw()
    return sides


@contextmanager
def _dark() -> Iterator[Any]:
    yield lambda: None


@contextmanager
def _screen(sides: tuple[Column, Column]) -> Iterator[Any]:
    """Two panels that are drawn again at most so often; what they end with stays."""
    with Live(console=console, auto_refresh=False) as live:
        last = 0.0

        def redraw() -> None:
            nonlocal last
            if time.monotonic() - last >= REDRAWN_S or all(one.ended for one in sides):
                live.update(_panels(sides), refresh=True)
                last = time.monotonic()

        yield redraw


def _panels(sides: tuple[Column, Column]) -> Table:
    grid = Table.grid(expand=True)
    for _ in sides:
        grid.add_column(ratio=1)
    grid.add_row(
        *(
            Panel(one.text(), title=one.title, subtitle=f"{len(one.token_ids)} tokens, {one.tokens_per_s:.0f} tok/s")
            for one in sides
        )
    )
    return grid
