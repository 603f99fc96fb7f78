"""The drafters there are, as one table: a drafter's class, what proposes with it, and what reads it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.drafters.base import Drafter, DrafterFiles, Proposer
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.dspark.checkpoint import read_block, read_block_draft
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.propose import BlockProposer
from fledge.drafters.eagle3.checkpoint import read_draft
from fledge.drafters.eagle3.head import read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.propose import EagleProposer
from fledge.drafters.lookup.propose import LookupProposer, PromptLookup, read_lookup
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError

MOST_FREE = 15  # tokens of a chain that takes no time


@dataclass(frozen=True)
class DrafterKind:
    """One kind of drafter."""

    drafter: type
    """The class of `fledge.drafters.base.Drafter`."""
    proposer: Callable[[Any, TreeShape, int, int], Proposer]
    """From a drafter, the shape of its trees, the number of sequences and of cache rows."""
    read: Callable[[str], DrafterFiles | None]
    """From what --draft says; None where that names another kind."""
    tensors: Callable[[Path], dict[str, Tensor]] | None = None
    """From the folder of a saved one, checked; None where it has no weights."""


DRAFTERS = [
    DrafterKind(PromptLookup, LookupProposer, read_lookup),
    DrafterKind(BlockDraft, BlockProposer, read_block_draft, lambda folder: read_block(folder).tensors),
    # the last: whatever no other kind knows is a folder of it
    DrafterKind(DraftModel, EagleProposer, read_draft, lambda folder: read_head(folder).tensors),
]

_beside: "weakref.WeakKeyDictionary[Drafter, Drafter]" = weakref.WeakKeyDictionary()


def read_drafter(name: str | Path) -> DrafterFiles:
    """The drafter that --draft names."""
    return next(files for kind in DRAFTERS if (files := kind.read(str(name))) is not None)


def kind_of(drafter: Drafter) -> DrafterKind:
    """The row of a drafter."""
    for kind in DRAFTERS:
        if isinstance(drafter, kind.drafter):
            return kind
    names = ", ".join(kind.drafter.__name__ for kind in DRAFTERS)
    raise UserError(f"a {type(drafter).__name__} is no drafter. Give the name of one (--draft), or one of: {names}.")


def proposer_of(drafter: Drafter, shape: TreeShape, batch: int, capacity: int) -> Proposer | None:
    """The drafter at work on `batch` sequences; None where the shape leaves nothing to draft."""
    return kind_of(drafter).proposer(drafter, shape, batch, capacity) if shape.levels else None


def free_proposer(drafter: Drafter, shape: TreeShape, batch: int) -> Proposer | None:
    """Chains that take no time: the drafter's own, else prompt lookup's beside it. Of the shape's nodes at most, and of
    MOST_FREE."""
    if not drafter.takes_no_time:
        drafter = _beside.setdefault(drafter, PromptLookup())
    nodes = min(shape.total_token - 1, MOST_FREE)
    chain = TreeShape(1 + nodes, max(nodes - 1, 0), 1)
    return proposer_of(drafter, chain, batch, 0)


def load_weights(drafter: BoundHead, folder: Path) -> None:
    """Take the weights of a saved drafter of the same config."""
    tensors = kind_of(drafter).tensors
    assert tensors is not None, f"a {type(drafter).__name__} has no weights"
    drafter.load_state_dict(tensors(folder), strict=False)
