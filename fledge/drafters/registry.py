"""The drafters there are, as one table: a drafter's class and what makes a proposer of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.drafters.base import Proposer
from fledge.drafters.eagle3.checkpoint import bind_head
from fledge.drafters.eagle3.head import read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.propose import EagleProposer
from fledge.drafters.lookup.propose import LookupProposer
from fledge.drafters.tree import TreeShape


@dataclass(frozen=True)
class PromptLookup:
    """The drafter without weights (`--draft lookup`)."""


Drafter = DraftModel | PromptLookup

# class -> (drafter, tree shape, number of sequences, cache rows) -> proposer
PROPOSERS: dict[type, Callable[[Any, TreeShape, int, int], Proposer]] = {
    DraftModel: EagleProposer,
    PromptLookup: lambda drafter, shape, batch, capacity: LookupProposer(shape, batch),
}


LOOKUP = "lookup"  # what --draft says for the drafter that is no folder


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter read from its files, and checked, that waits for its target."""

    tap_layers: tuple[int, ...] | None  # the target layers that it reads; None where it reads none
    bind: Callable[[Tensor], Drafter]  # from the target's input embedding (V, H)


def read_drafter(name: str | Path) -> DrafterFiles:
    """The drafter that --draft names."""
    if str(name) == LOOKUP:
        return DrafterFiles(None, lambda embedding: PromptLookup())
    head, folder = read_head(Path(name)), Path(name)
    return DrafterFiles(tuple(head.config.tap_layers), lambda embedding: bind_head(head, embedding, folder))


def proposer_of(drafter: Drafter, shape: TreeShape, batch: int, capacity: int) -> Proposer | None:
    """The drafter at work on `batch` sequences; None where the shape leaves nothing to draft."""
    if not shape.levels:
        return None
    known = next(kind for kind in type(drafter).__mro__ if kind in PROPOSERS)
    return PROPOSERS[known](drafter, shape, batch, capacity)
