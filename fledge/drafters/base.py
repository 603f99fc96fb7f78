"""The seam between drafters and the rest: what decoding may ask of any drafter.

A drafter is read from its files (`DrafterFiles`), bound to its target (`Drafter`) and set to work on B sequences
(`Proposer`); `fledge.drafters.registry` has a row for each kind. It proposes trees of tokens; decoding verifies them
and knows nothing of how they came about. Everything is said for B sequences at once, in slots 0 .. B-1. A sequence of L
committed tokens and its root (the last emitted token, whose row the target has not computed yet) looks like this to
both sides:

    token      x_0 x_1 .. x_(L-1) | x_L = root
    position   0   1   .. L-1     | L
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fledge.drafters.tree import Trees
from fledge.target.model import Target

# B sequences, P prompt tokens, E new tokens, A tapped layers, H hidden size, K keys (rows of a cache that are read)


class Drafter(Protocol):
    """A drafter bound to its target: what decoding must know of it before it works."""

    needs_host: bool  # whether it looks at token ids on the host: its rounds cannot be captured into a graph
    takes_no_time: bool  # whether its drafts come without a forward of a network

    @property
    def tap_layers(self) -> tuple[int, ...] | None:
        """The target layers whose inputs it reads; None where it reads none."""
        ...

    @property
    def devices(self) -> frozenset[torch.device]:
        """Where its weights lie."""
        ...


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter read from its files, and checked, that waits for its target."""

    tap_layers: tuple[int, ...] | None  # the target layers that it reads; None where it reads none
    grows_trees: bool  # whether its proposers are `TreeProposer`s
    bind: Callable[[Target], Drafter]  # its embedding, and its head where the drafter shares it


@dataclass(frozen=True)
class Emitted:
    """The tokens a round (or several) emitted: what a proposer has not followed yet."""

    token_ids: Tensor  # (B, E); the first num_new of a row count, the last of them is the root
    num_new: Tensor  # (B,) at least 1
    taps: Tensor | None  # (B, E, A, H) the target's tapped states of the token *before* each; None: not asked for
    lengths: Tensor  # (B,) committed tokens, the root not among them

    @property
    def roots(self) -> Tensor:  # (B, 1)
        return self.token_ids.gather(1, self.num_new[:, None] - 1)


class Budget(Protocol):
    """Decides round by round how much drafting pays (`fledge.decoding.adaptive`). One sequence at a time."""

    def begin(self) -> None:
        """A round begins."""
        ...

    def without_drafting(self, scores: Tensor) -> int:
        """How many nodes of a chain that took no time, with these log-chances (C,), to verify instead of drafting."""
        ...

    def drafts(self) -> bool:
        """Is there time for drafting?"""
        ...

    def deeper(self, beam_scores: Tensor) -> bool:
        """After a level whose best nodes have these log-chances (k,): is another level worth its time?"""
        ...

    def num_nodes(self, scores: Tensor, at_most: int) -> int:
        """How many candidates with these log-chances (C,) to verify, the best first."""
        ...


class Proposer(Protocol):
    """A drafter at work on one target: it follows what was emitted and proposes what may come next."""

    num_levels: int  # deepest level of its trees
    num_drafted: int  # most drafted nodes of a tree
    rows_ahead: int  # cache rows behind the committed ones that it may write in a round
    needs_taps: bool  # whether it reads the target's tapped states

    def fill(self, slot: int, token_ids: Tensor, taps: Tensor | None, positions: Tensor) -> None:
        """A prompt (P,) enters this slot; its taps (P, A, H) and the target's rope positions (P,) or (axes, P)."""
        ...

    def follow(self, emitted: Emitted, num_keys: int) -> None:
        """Take in new tokens of slots 0 .. B-1. No cache row beyond `num_keys` is read."""
        ...

    def propose(self, emitted: Emitted, num_levels: int, num_keys: int, budget: Budget | None = None) -> Trees:
        """Trees below the roots just followed, of `num_levels` >= 1 levels at most."""
        ...

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of `capacity` rows; what is in the caches stays."""
        ...

    def move(self, source: int, goal: int) -> None:
        """The sequence of slot `source` goes on in slot `goal`, whose own has ended."""
        ...


@runtime_checkable
class TreeProposer(Proposer, Protocol):
    """A proposer whose trees are chosen from scored candidates: the best shape of them can be measured."""

    width: int  # children per node

    def candidates(
        self, lengths: Tensor, num_levels: int, num_keys: int, budget: Budget | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, target ids and parents (B, C) of all candidates, in the order of `fledge.drafters.tree`: level by
        level, parent -1 for the root."""
        ...
