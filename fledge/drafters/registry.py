"""The drafters there are, as one table: a drafter's class and what makes a proposer of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fledge.draft.model import DraftModel
from fledge.drafters.base import Proposer
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


def proposer_of(drafter: Drafter, shape: TreeShape, batch: int, capacity: int) -> Proposer | None:
    """The drafter at work on `batch` sequences; None where the shape leaves nothing to draft."""
    return PROPOSERS[type(drafter)](drafter, shape, batch, capacity) if shape.levels else None
