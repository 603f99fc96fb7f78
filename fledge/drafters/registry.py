"""The drafters there are, as one table: a drafter's class and what makes a proposer of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.draft.checkpoint import load_draft
from fledge.draft.config import from_json
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


LOOKUP = "lookup"  # what --draft says for the drafter that is no folder


def load_drafter(name: str | Path, embedding: Tensor) -> Drafter:
    """The drafter that --draft names, for the target whose input embedding (V, H) is given."""
    return PromptLookup() if str(name) == LOOKUP else load_draft(name, embedding)


def tap_layers_of(name: str | Path) -> tuple[int, ...] | None:
    """The target layers that the drafter reads; None where it reads none."""
    return None if str(name) == LOOKUP else tuple(from_json(Path(name) / "config.json").tap_layers)


def proposer_of(drafter: Drafter, shape: TreeShape, batch: int, capacity: int) -> Proposer | None:
    """The drafter at work on `batch` sequences; None where the shape leaves nothing to draft."""
    if not shape.levels:
        return None
    known = next(kind for kind in type(drafter).__mro__ if kind in PROPOSERS)
    return PROPOSERS[known](drafter, shape, batch, capacity)
