"""The tree that is drafted where nobody names one: the engine's own choice.

On a CPU it is a small one, of which every round drafts and verifies as much as pays (`adaptive.py`), down to nothing,
and where the text repeats itself the repetition instead: with a head that does not pay, decoding is no slower than
plain. On a GPU, where rounds are captured, one of two trees or
none is chosen for every answer. What rounds cost is measured once per machine and pair of models, in a few seconds, and
kept in the user's cache folder. Acceptance is learned while decoding.
"""

import weakref
from typing import Any

import msgspec
import torch
from torch import nn

from fledge import provenance
from fledge.decoding.adaptive import AdaptiveBudget, TreeChoice
from fledge.decoding.costs import draft_times, verify_times
from fledge.decoding.exact import is_exact
from fledge.decoding.generate import generate, uses_fixed_shapes
from fledge.decoding.probe import shape_for
from fledge.decoding.records import Generation
from fledge.drafters.base import Drafter
from fledge.drafters.tree import TreeShape
from fledge.outputs import cached
from fledge.target import native
from fledge.target.model import Target

LARGE = TreeShape()
SMALL = TreeShape(16, 4, 4)
NONE = TreeShape(1, 0, 1)  # the root alone: plain decoding
SHARES = {LARGE: 1.0, SMALL: 0.78}  # of LARGE's tokens beyond one (docs/study.md: 60, 16 nodes)
SIZES = (1, 2, 4, 8, 16)  # of trees; what lies between is interpolated
PREFIX = 128  # tokens of the text behind which costs are measured
SAMPLE = 12  # tokens that are decoded to measure the rest of a round
ENGINE = 4  # one more when the engine computes in another way, and costs that are kept no longer hold


class PairCosts(msgspec.Struct, frozen=True):
    """Seconds of the parts of a round."""

    verify_s: dict[int, float]  # by nodes; the rest of a plain round included
    draft_s: dict[int, float]  # by levels
    overhead_s: float  # what the rest of a drafting round takes longer


class TreeCosts(msgspec.Struct, frozen=True):
    """Seconds of whole rounds of fixed shapes."""

    plain_s: float
    round_s: list[float]  # of SHARES


_budgets: "weakref.WeakKeyDictionary[Target, list[tuple[Any, Any]]]" = weakref.WeakKeyDictionary()


def usual_tree(*, on_cpu: bool, grows_trees: bool) -> TreeShape:
    """The most that is drafted."""
    return SMALL if on_cpu and grows_trees else LARGE


def default_tree(target: Target, drafter: Drafter | None, *, at_once: int = 1) -> tuple[TreeShape, Any]:
    """The tree to draft and the budget that decides how much of it, None for all of it.

    A budget is kept with its target, so that what was learned about a head holds for the next prompt. It decides for
    one sequence: several at once decode plainly on a CPU, whose products are busy with them, and with the large tree on
    a GPU.
    """
    if drafter is None:
        return LARGE, None
    fixed = uses_fixed_shapes("auto", target, drafter)
    if not fixed and target.device.type != "cpu":
        return LARGE, None
    if at_once > 1 or shape_for(target, SMALL) is None:
        return LARGE if fixed else NONE, None
    known = _budgets.setdefault(target, [])
    budget = next((budget for of, budget in known if of() is drafter), None)
    if budget is None:
        budget = tree_choice(target, drafter) if fixed else adaptive_budget(target, drafter)
        known[:] = [pair for pair in known if pair[0]() is not None]
        known.append((weakref.ref(drafter), budget))
    return LARGE if fixed else SMALL, budget


def adaptive_budget(target: Target, drafter: Drafter) -> AdaptiveBudget:
    """What decides in every round."""
    costs = cached("costs", key_of(target, drafter), PairCosts, lambda: measured_costs(target, drafter))
    return AdaptiveBudget(
        plain_s=costs.verify_s[1], verify_s=costs.verify_s, draft_s=costs.draft_s, overhead_s=costs.overhead_s
    )


def tree_choice(target: Target, drafter: Drafter) -> TreeChoice:
    """What decides for every answer."""
    key = f"{key_of(target, drafter)}, {provenance.hardware()['gpus']}, exact {is_exact(target)}, {list(SHARES)}"
    costs = cached("costs", key, TreeCosts, lambda: measured_rounds(target, drafter))
    return TreeChoice(costs.plain_s, dict(zip(SHARES, costs.round_s, strict=True)), SHARES)


def drafting(
    target: Target, drafter: Drafter | None, tree: TreeShape | None, *, at_once: int = 1
) -> dict[str, Any]:  # fmt: skip
    """Options of `generate` (of `generate_batch` for several at once): this tree, or the engine's own choice."""
    if tree is not None:
        return {"tree": tree}
    tree, budget = default_tree(target, drafter, at_once=at_once)
    return {"tree": tree} if budget is None else {"tree": tree, "budget": budget}


def measured_rounds(target: Target, drafter: Any) -> TreeCosts:
    """Time whole rounds behind a text of no meaning, each kind for the second time: the first captures them."""
    tokens, options = sample_of(target)
    ways: list[tuple[Any, TreeShape]] = [(None, NONE), *((drafter, tree) for tree in SHARES)]
    seconds = []
    for drafts, tree in ways:
        runs = [generate(target, drafts, tokens, tree=tree, **options) for _ in range(3)]
        seconds.append(min(run.decode_s / max(run.num_forwards, 1) for run in runs[1:]))
    return TreeCosts(seconds[0], seconds[1:])


def sample_of(target: Target) -> tuple[list[int], dict[str, Any]]:
    """A text of no meaning, and how it is followed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (PREFIX,), generator=generator).tolist()
    return tokens, {"max_new_tokens": SAMPLE, "eos_token_ids": ()}


@torch.inference_mode()
def measured_costs(target: Target, drafter: Drafter) -> PairCosts:
    """Time the parts of a round behind a text of no meaning."""
    tokens, options = sample_of(target)
    verify_s = verify_times(target, tokens, SIZES)
    draft_s = {} if drafter.takes_no_time else draft_times(target, drafter, tokens, SMALL.top_k)
    plain = _rest(generate(target, None, tokens, **options))
    drafting = _rest(generate(target, drafter, tokens, tree=SMALL, **options))
    return PairCosts(
        {nodes: seconds + plain for nodes, seconds in verify_s.items()},
        {levels: draft_s[levels] for levels in draft_s if levels <= SMALL.levels}, max(drafting - plain, 0.0),
    )  # fmt: skip


def _rest(run: Generation) -> float:
    return (run.phases_s["accept"] + run.phases_s["other"]) / max(run.num_forwards, 1)


def key_of(target: Target, drafter: Drafter) -> str:
    """What costs depend on: machine, library and the shapes of both models."""
    models = [model for model in (target.model, drafter) if isinstance(model, nn.Module)]
    return f"{provenance.costs_key(*models)}, compiled {native.fingerprint()}, engine {ENGINE}, {SMALL}"
