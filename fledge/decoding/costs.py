"""What the parts of a round cost on this machine: V(n), the target's time for n tokens, and D, the head's for a tree.
On a GPU they are captured, as rounds are there.

Different sizes are timed in turns, so that a machine that is busy for a while is so for all of them; the shortest time
of each counts. Knows target, head and clock.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fledge.decoding.capture import Timer, as_captured
from fledge.decoding.exact import verifier_of
from fledge.decoding.verifier import Lengths
from fledge.drafters.base import Drafter, Emitted, TreeProposer
from fledge.drafters.registry import proposer_of
from fledge.drafters.tree import Trees, TreeShape, ancestors_of
from fledge.errors import UserError
from fledge.target.model import Target

MAX_LEVELS = 8
TURNS = 5
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """Seconds per round, by part."""

    plain_s: float
    verify_s: dict[int, float]  # by number of nodes
    draft_s: dict[tuple[int, int], float]  # by top_k and levels
    overhead_s: float

    def round_s(self, nodes: int, levels: int, width: int) -> float:
        """One round of a tree; between two measured node counts the time is interpolated."""
        sizes = sorted(self.verify_s)
        verify = float(np.interp(nodes, sizes, [self.verify_s[size] for size in sizes]))
        return verify + self.draft_s[width, levels] + self.overhead_s


# -- the target --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def verify_times(
    target: Target, tokens: list[int], sizes: Sequence[int], on_step: Callable[[int], None] = lambda _: None
) -> dict[int, float]:
    """Seconds for one forward and head over so many tokens behind a prefix."""
    device, length = target.device, len(tokens)
    verifier = verifier_of(target, 1, length + max(sizes))
    known = (length,) if device.type == "cpu" else None  # as in rounds of either policy
    ids, lengths = torch.tensor([tokens], device=device), Lengths(torch.tensor([length], device=device), known)

    def call(nodes: int) -> Callable[[], Any]:
        levels = torch.arange(nodes, device=device)[None].clamp(max=nodes if verifier.chains_only else 1)
        parents = (levels - 1).clamp(min=0)  # a chain, or children of the root
        trees = Trees(ids[:, -1:].repeat(1, nodes), parents, levels, ancestors_of(parents, int(levels[0, -1])))
        return lambda: verifier.head(verifier.verify(trees, lengths, length + nodes, taps=nodes > 1).last_hidden)

    with verifier.running():
        verifier.prefill(slice(0, 1), ids, taps=False)
        return times_in_turns({nodes: call(nodes) for nodes in sizes}, device, on_step)


def verify_time(target: Target, tokens: list[int], nodes: int) -> float:
    """The same for one size."""
    return verify_times(target, tokens, (nodes,))[nodes]


# -- the head ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def draft_times(target: Target, draft: Drafter, tokens: list[int], width: int) -> dict[int, float]:
    """Seconds to follow three new tokens and grow a tree, by its levels."""
    device, length = target.device, len(tokens) - 1
    shape = TreeShape(max(96, MAX_LEVELS + 1), MAX_LEVELS - 1, width)
    proposer = tree_proposer(draft, shape, len(tokens))
    ids = torch.tensor(tokens, device=device)
    size = (len(tokens), len(target.tap_layers), target.hidden_size)
    taps = torch.zeros(size, device=device, dtype=target.dtype)
    proposer.fill(0, ids, taps, torch.arange(len(tokens), device=device))
    emitted, num_keys = emitted_between(ids, taps, length - 2, length), length + proposer.rows_ahead

    def call(levels: int) -> Callable[[], Any]:
        def once() -> None:
            proposer.follow(emitted, num_keys)
            proposer.propose(emitted, levels, num_keys)

        return once

    deepest = min(MAX_LEVELS, proposer.num_levels)  # a drafter may know no deeper trees
    found = times_in_turns({levels: call(levels) for levels in {1, deepest}}, device)
    step = (found[deepest] - found[1]) / max(deepest - 1, 1)
    return {levels: found[1] + step * (min(levels, deepest) - 1) for levels in range(1, MAX_LEVELS + 1)}


def largest_tree(width: int) -> TreeShape:
    """All candidates of `width` children per node."""
    return TreeShape(candidate_count(width, MAX_LEVELS) + 1, MAX_LEVELS - 1, width)


def tree_proposer(draft: Drafter, shape: TreeShape, num_rows: int) -> TreeProposer:
    """The drafter at work on such trees behind a text of `num_rows` tokens."""
    proposer = proposer_of(draft, shape, 1, num_rows + candidate_count(shape.top_k, shape.levels))
    if not isinstance(proposer, TreeProposer):
        raise UserError("there are no trees to tune: this drafter proposes chains. Tune a draft head.")
    return proposer


def candidate_count(width: int, levels: int) -> int:
    """Candidates of a tree: `width` of level 1, `width` squared of every further one."""
    return width + width * width * (levels - 1)


def emitted_between(tokens: Tensor, taps: Tensor, first: int, root: int) -> Emitted:
    """Tokens `first` .. `root` of a text (T,) as one sequence emitted them, with the taps (T, A, H) before them."""
    count = torch.tensor([root + 1 - first], device=tokens.device)
    return Emitted(
        tokens[None, first : root + 1], count, taps[None, first - 1 : root], torch.tensor([root], device=tokens.device)
    )  # fmt: skip


# -- the clock ---------------------------------------------------------------------------------------------------------


def times_in_turns(
    calls: Mapping[Key, Callable[[], Any]], device: torch.device, on_step: Callable[[Key], None] = lambda _: None
) -> dict[Key, float]:
    """The shortest seconds of every call over TURNS turns, by the device's clock, after one turn to warm up."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    ready = {key: as_captured(call, device) for key, call in calls.items()}
    for turn in range(TURNS + 1):
        for key, call in ready.items():
            timer = Timer(device)
            timer.lap("begin")
            call()
            timer.lap("call")
            seconds[key].append(timer.seconds()["call"])
            if turn == TURNS:
                on_step(key)
    return {key: min(some[1:]) for key, some in seconds.items()}
