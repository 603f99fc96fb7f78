"""Which draft tree is fastest on this machine with this head.

    tokens per second of a tree (n nodes, L levels, k children) = E(n, L, k) / (V(n) + D(k, L) + o)

Measured here are V(n), the target's time for n tokens, D, the head's time for a tree, and o, the rest of a round. E,
the tokens emitted per round, is measured on answers that the target itself wrote. At positions along them the head
drafts the largest tree of every k. The rank of the true continuation among the candidates says how many of its tokens
each smaller tree would have kept: a tree of n nodes keeps the best n - 1 by score, so one pass answers for all n and L.
The choice is then confirmed by real decoding, interleaved with the default tree and plain decoding. Knows target, head
and prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fledge import provenance
from fledge.console import progress
from fledge.data.samples import Prompt
from fledge.decoding.costs import (
    MAX_LEVELS,
    RoundCosts,
    candidate_count,
    draft_times,
    emitted_between,
    largest_tree,
    tree_proposer,
    verify_times,
)
from fledge.decoding.generate import generate
from fledge.decoding.probe import ability_of
from fledge.decoding.records import Sampling
from fledge.decoding.tree_profile import TreeProfile
from fledge.drafters.base import Drafter
from fledge.drafters.tree import TreeShape, candidate_levels
from fledge.errors import UserError
from fledge.target.model import Target

NODES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 80, 96)
WIDTHS = (1, 2, 3, 4, 6, 8, 10)
POSITIONS_PER_ANSWER = 24
DEFAULT = TreeShape()


Ranks = dict[int, list[np.ndarray]]  # by top_k, per position: (MAX_LEVELS, MAX_LEVELS) [levels - 1, path level - 1]


@torch.inference_mode()
def tune(
    target: Target, draft: Drafter, prompts: Sequence[Prompt], *, sampling: Sampling, max_new_tokens: int,
    eos_token_ids: Sequence[int] | None = None,
) -> TreeProfile:  # fmt: skip
    """Measure costs and acceptance on these prompts, choose the best tree, confirm it by real decoding."""
    if (ability := ability_of(target)).most != "trees":
        raise UserError(f"{target.name}: there is no tree to tune, because {ability.reason}. Use --top-k 1.")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "sampling": sampling, "eos_token_ids": eos_token_ids,
    }  # fmt: skip
    generate(target, None, prompts[0].ids, **{**options, "max_new_tokens": 8}, model_inputs=prompts[0].model_inputs)
    answers = [
        generate(target, None, prompt.ids, **options, model_inputs=prompt.model_inputs).token_ids for prompt in prompts
    ]
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if len(answer) > MAX_LEVELS]
    if not pairs:
        raise UserError(
            f"all {len(prompts)} answers are shorter than {MAX_LEVELS + 1} tokens: too short to tune a tree on. Use "
            f"prompts that ask for more, or a larger --max-new-tokens."
        )
    widths = [width for width in WIDTHS if tree_proposer(draft, largest_tree(width), 0).width == width]
    with progress("tune", len(widths) + len(NODES) + 3) as bar:
        ranks: Ranks = {}
        for width in widths:
            ranks[width] = list(ranks_along(target, draft, pairs, width))
            bar.advance(note=f"acceptance, top_k {width}")
        costs = measure_costs(target, draft, pairs[0], widths, options, lambda note: bar.advance(note=note))
        curve = best_by_nodes(ranks, costs)
        best = max(curve, key=lambda point: point["tokens_per_s"])
        tree = TreeShape(int(best["total_token"]), int(best["depth"]), int(best["top_k"]))
        measured = confirm(target, draft, [prompt for prompt, _ in pairs], tree, options)
        bar.advance(2, note="confirmed")
    return TreeProfile(
        tree=tree, tau=best["tau"], tokens_per_s=best["tokens_per_s"], plain_tokens_per_s=1.0 / costs.plain_s,
        temperature=sampling.temperature, measured=measured, curve=curve, hardware=provenance.hardware(),
        costs={
            "verify_s": costs.verify_s, "overhead_s": costs.overhead_s,
            "draft_s": {f"{width}x{levels}": seconds for (width, levels), seconds in costs.draft_s.items()},
        },
    )  # fmt: skip


# -- acceptance --------------------------------------------------------------------------------------------------------


def ranks_along(
    target: Target, draft: Drafter, pairs: Sequence[tuple[Prompt, list[int]]], width: int
) -> Iterator[np.ndarray]:
    """For positions spread over every answer: the ranks of the true continuation in the head's largest tree."""
    levels = candidate_levels(width, MAX_LEVELS).numpy()
    for prompt, answer in pairs:
        whole = prompt.followed_by(answer)
        tokens = torch.tensor(whole.ids, device=target.device)
        where = target.positions(tokens, whole.model_inputs) if whole.model_inputs else None
        extra_inputs: dict[str, Any] = dict(whole.model_inputs)
        taps = target.forward(
            tokens[None], position_ids=None if where is None else where[..., None, :], **extra_inputs
        ).tap_hidden  # fmt: skip
        assert taps is not None
        proposer = tree_proposer(draft, largest_tree(width), len(tokens))
        rows = torch.arange(len(tokens), device=target.device) if where is None else where
        done = len(prompt)
        proposer.fill(0, tokens[:done], taps[0, :done], rows[..., :done])
        for root in positions(len(prompt), len(answer)):
            emitted = emitted_between(tokens, taps[0], done, root)
            num_keys = root + proposer.rows_ahead
            proposer.follow(emitted, num_keys)
            done = root + 1
            found = proposer.candidates(emitted.lengths, MAX_LEVELS, num_keys)
            scores, drafted, parents = (one[0].float().cpu().numpy() for one in found)
            truth = whole.ids[root + 1 : root + 1 + MAX_LEVELS]
            yield continuation_ranks(scores, drafted, parents, levels[: len(scores)], truth)


def positions(prompt_len: int, answer_len: int) -> list[int]:
    """Roots spread evenly over an answer, each with a whole tree's depth of answer behind it."""
    last = prompt_len + answer_len - 1 - MAX_LEVELS
    return sorted({int(p) for p in np.linspace(prompt_len, max(prompt_len, last), POSITIONS_PER_ANSWER)} - {0})


def continuation_ranks(
    scores: np.ndarray, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, truth: Sequence[int]
) -> np.ndarray:
    """Rank of the j-th true token's node among the candidates of the first L levels, at [L - 1, j - 1].

    Infinite where the tree does not hold the token. A tree of n nodes holds the ranks below n - 1.
    """
    ranks = np.full((MAX_LEVELS, MAX_LEVELS), np.inf)
    node = -1
    for level, token in enumerate(truth, start=1):
        found = np.flatnonzero((levels == level) & (parents == node) & (tokens == token))
        if not len(found):
            break
        node = found[0]
        better = (scores > scores[node]) | ((scores == scores[node]) & (np.arange(len(scores)) < node))
        for limit in range(level, MAX_LEVELS + 1):
            ranks[limit - 1, level - 1] = np.count_nonzero(better & (levels <= limit))
    return ranks


def expected_tau(ranks: Sequence[np.ndarray], nodes: int, levels: int) -> float:
    """Mean tokens per round of a tree: one, and one for every true token it holds (ranks rise along the path)."""
    return 1.0 + float(np.mean([np.count_nonzero(one[levels - 1] < nodes - 1) for one in ranks]))


def best_by_nodes(ranks: Ranks, costs: RoundCosts) -> list[dict[str, float]]:
    """For every number of nodes the levels and children with most expected tokens per second."""
    curve = []
    for nodes in NODES:
        points = []
        for width, some in ranks.items():
            if width > nodes - 1 and width > 1:  # decoding would narrow it to nodes - 1
                continue
            for levels in range(1, min(MAX_LEVELS, nodes - 1) + 1):
                tau = expected_tau(some, nodes, levels)
                speed = tau / costs.round_s(min(nodes, candidate_count(width, levels) + 1), levels, width)
                points.append(
                    {"total_token": nodes, "depth": levels - 1, "top_k": width, "tau": tau, "tokens_per_s": speed}
                )
        if points:
            curve.append(max(points, key=lambda point: point["tokens_per_s"]))
    return curve


# -- costs -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_costs(
    target: Target, draft: Drafter, pair: tuple[Prompt, list[int]], widths: Sequence[int],
    options: dict[str, Any], on_step: Callable[[str], None],
) -> RoundCosts:  # fmt: skip
    """Time the parts of a round in the middle of an answer."""
    prompt, answer = pair
    tokens = prompt.ids + answer[: len(answer) // 2]  # as text: what a round costs, pictures do not change
    verify_s = verify_times(target, tokens, (1, *NODES), lambda nodes: on_step(f"verifying {nodes} tokens"))
    draft_s = {
        (width, levels): seconds
        for width in widths
        for levels, seconds in draft_times(target, draft, tokens, width).items()
    }
    short = {**options, "max_new_tokens": 32, "model_inputs": prompt.model_inputs}
    run = generate(target, draft, prompt.ids, tree=TreeShape(8, 2, 2), **short)
    overhead = (run.phases_s["accept"] + run.phases_s["other"]) / max(run.num_forwards, 1)
    on_step("drafting")
    return RoundCosts(verify_s.pop(1), verify_s, draft_s, overhead)


def confirm(
    target: Target, draft: Drafter, prompts: Sequence[Prompt], tree: TreeShape, options: dict[str, Any]
) -> dict[str, float]:
    """Real decoding speeds on the same prompts, interleaved: plain, the chosen tree, the default tree."""
    ways: dict[str, tuple[Drafter | None, TreeShape | None]] = {
        "plain": (None, None), "chosen": (draft, tree), "default": (draft, DEFAULT),
    }  # fmt: skip
    tokens, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for prompt in prompts:
        for way, (drafter, shape) in ways.items():
            made = generate(target, drafter, prompt.ids, tree=shape, model_inputs=prompt.model_inputs, **options)
            tokens[way] += len(made.token_ids) - 1
            seconds[way] += made.decode_s
    return {way: tokens[way] / seconds[way] for way in ways}
