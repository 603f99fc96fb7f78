"""Choosing and accepting tokens: one rule for every temperature.

At each node of the draft tree the target chooses its own next token (argmax at temperature 0, else a draw). The walk
from the root follows the chosen tokens as long as they are among the node's children; the last chosen token is the
bonus. The tree is a deterministic function of the context, so what is emitted follows exactly the target's law.

A draw inverts the cumulative distribution at a number that depends on the request's seed and the token's position
alone (`noise.py`). So the same seed gives the same text with and without a draft, as a tree or a chain, alone or in a
batch, as far as the target's logits are the same.

A repetition penalty makes the choice at a node depend on the tokens before it: those that were committed (`seen`) and
those of the node's ancestors.

Knows trees, token ids and logits. Knows nothing of models, caches or time: every function is a pure function of
tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.decoding.noise import uniforms
from fledge.decoding.records import Sampling
from fledge.drafters.tree import Trees
from fledge.target import card

PART = 256  # tokens; a cumulative sum over 49152 of them takes 20 ms for 64 rows on a CPU, over 192 parts half a one
NUCLEUS_GUESS = (
    512  # tokens that usually hold top_p; sorting them costs a tenth of sorting 49152 (24 against 286 ms for 60 rows)
)

# B sequences, N tree nodes, V target vocabulary, E slots: the most nodes of a path, root included; R rows


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every sequence. A path has one node of every level down to its last."""

    path: Tensor  # (B, E) nodes, root first; slots behind the path say node 0
    token_ids: Tensor  # (B, E) the target's choice after each node: what is emitted; the last one is the bonus
    num_accepted: Tensor  # (B,) nodes of the path, root included, which is also the number of tokens


def one_node(device: torch.device) -> Accepted:
    """What a round of plain decoding accepts: the root."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return Accepted(zero, zero, zero[0] + 1)


def accept(
    trees: Trees, logits: Tensor, samplings: Sequence[Sampling], seeds: Tensor, lengths: Tensor, num_slots: int, *,
    lazily: bool, seen: Tensor | None = None,
) -> Accepted:  # fmt: skip
    """The accepted path of each tree. logits (B, N, V) are the target's at every node, seeds and lengths (B,), seen
    (B, V) bool the tokens up to the root, for a repetition penalty.

    `lazily`: where tokens are not simply the argmax, the target chooses only at the nodes the walk comes by. On a CPU a
    draw costs more than a step of the walk (60 rows of 49152 tokens, top-p 0.9, on one core: 24 ms for all nodes,
    0.6 ms per step).
    """
    if lazily and not all(sampling.takes_the_argmax for sampling in samplings):
        return walk(trees, logits, samplings, seeds, lengths, num_slots, seen)
    noise = _noise(samplings, seeds, lengths[:, None] + trees.levels + 1)
    before = None
    if seen is not None and any(sampling.penalises for sampling in samplings):
        before = seen_at_nodes(trees, seen).flatten(0, 1)
    laws = _repeated(samplings, trees.num_nodes)
    chosen = choose_all(logits.flatten(0, 1), laws, noise, before).view_as(trees.token_ids)
    path, num_accepted = accepted_paths(trees, chosen, num_slots)
    return Accepted(path, chosen.gather(1, path), num_accepted)


def seen_at_nodes(trees: Trees, seen: Tensor) -> Tensor:
    """The tokens up to each node (B, N, V) bool, itself included, from those up to the root (B, V)."""
    tokens, roots = trees.token_ids[:, None, :], trees.token_ids[:, :1, None]
    on_the_way = torch.where(trees.ancestors, tokens, roots)  # (B, N, N); the root has been seen anyway
    return seen[:, None].repeat(1, trees.num_nodes, 1).scatter_(2, on_the_way, True)


def accepted_paths(trees: Trees, chosen: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The walk from each root along the target's choices (B, N): nodes by level (B, E), and how many they are (B,).

    Siblings differ, so the nodes whose token, and whose ancestors' tokens, the target chose form one path:

        chosen after root = a, after a = c          root a  b  a.c  a.d
        matches its parent's choice                  1   1  0   1    0
        and so do all its ancestors                  1   1  0   1    0      -> nodes 0, 1, 3; bonus chosen[3]
    """
    matches = trees.token_ids == chosen.gather(1, trees.parents)
    matches[:, :1].fill_(True)
    on_path = (matches[:, None, :] | ~trees.ancestors).all(dim=-1)
    slot = torch.where(on_path, trees.levels, num_slots)  # the last slot takes all others, and is cut off
    nodes = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    path = torch.zeros(len(chosen), num_slots + 1, dtype=torch.int64, device=chosen.device).scatter_(1, slot, nodes)
    return path[:, :num_slots], on_path.sum(dim=-1)


def walk(
    trees: Trees, logits: Tensor, samplings: Sequence[Sampling], seeds: Tensor, lengths: Tensor, num_slots: int,
    seen: Tensor | None = None,
) -> Accepted:  # fmt: skip
    """The same walk step by step: the target chooses at a node when the walk comes there."""
    batch = len(logits)
    path, token_ids = (torch.zeros(batch, num_slots, dtype=torch.int64) for _ in range(2))
    num_accepted = torch.zeros(batch, dtype=torch.int64)
    node, going = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    before = seen.clone() if seen is not None and any(sampling.penalises for sampling in samplings) else None
    for slot in range(num_slots):
        laws = [samplings[row] for row in going.tolist()]
        noise = _noise(laws, seeds[going], (lengths[going] + slot + 1)[:, None])
        chosen = choose_all(logits[going, node], laws, noise, None if before is None else before[going])
        if before is not None:
            before[going, chosen] = True
        path[going, slot], token_ids[going, slot] = node, chosen
        num_accepted[going] += 1
        follows = (trees.parents[going] == node[:, None]) & (trees.token_ids[going] == chosen[:, None])
        follows[:, 0] = False  # the root is its own parent
        found = follows.any(dim=-1)
        if not found.any():
            break
        node, going = follows[found].int().argmax(dim=-1), going[found]
    return Accepted(path, token_ids, num_accepted)


def choose_all(
    logits: Tensor, samplings: Sequence[Sampling], noise: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """The target's token for each row of logits (R, V), each under its own sampling: (R,) int64. noise (R,), seen
    (R, V) the tokens before each."""
    laws = {sampling.law for sampling in samplings}
    if len(laws) == 1:
        return choose(logits, samplings[0], noise, seen)
    chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for law in laws:
        rows = torch.tensor([row for row, one in enumerate(samplings) if one.law == law], device=logits.device)
        its_noise, its_seen = (None if given is None else given[rows] for given in (noise, seen))
        chosen[rows] = choose(logits[rows], law, its_noise, its_seen)
    return chosen


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """The target's token for each row of logits (R, V): (R,) int64. `noise` (R,) uniform in [0, 1), for draws; `seen`
    (R, V) bool, for a repetition penalty."""
    if sampling.penalises:
        assert seen is not None
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices  # the first of equals, as argmax, and several times faster on a CPU
    assert noise is not None
    return draw(distribution(logits, sampling), noise)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (R, V) float32 in which the tokens already seen are less likely (more likely where penalty < 1)."""
    scores = logits.float()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (R, V) float32, unnormalised, of penalised logits: temperature, top-k, top-p, min-p. Tokens tied
    with the last kept one are kept."""
    scores = logits.float() / sampling.temperature
    vocab_size = scores.shape[-1]
    kept = min(sampling.top_k, vocab_size) if sampling.top_k else vocab_size
    if kept < vocab_size:
        best = scores.topk(kept, dim=-1).values
        scores = scores.masked_fill(scores < best[..., -1:], float("-inf"))
    probabilities = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        least = least_kept(probabilities, sampling.top_p, kept)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if sampling.min_p:
        best = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * best, 0.0)
    return probabilities


def least_kept(probabilities: Tensor, top_p: float, at_most: int) -> Tensor:
    """The smallest probability in the nucleus: the least set of most likely tokens that holds top_p. (R, 1)

    at_most bounds the number of tokens with probability > 0, up to ties; only they are sorted.
    """
    if at_most > NUCLEUS_GUESS and card.fits(probabilities):
        from fledge.decoding import kernels

        return kernels.least_kept(probabilities, top_p)
    if probabilities.is_cuda and at_most > NUCLEUS_GUESS:
        return least_kept_unsorted(probabilities, top_p)
    ranked = probabilities.topk(min(at_most, NUCLEUS_GUESS), dim=-1).values
    if ranked.shape[-1] < at_most and (ranked.sum(dim=-1) < top_p).any():
        ranked = probabilities.topk(at_most, dim=-1).values  # a wide nucleus
    before = ranked.cumsum(dim=-1) - ranked  # probability held by the tokens ahead of each
    inside = (before < top_p).sum(dim=-1, keepdim=True).clamp_min(1)
    return ranked.gather(-1, inside - 1)


def least_kept_unsorted(probabilities: Tensor, top_p: float) -> Tensor:
    """`least_kept` where asking costs more than computing and sorting more than both: on a GPU.

    A probability is in the nucleus if those above it hold less than top_p. Positive numbers are ordered like their
    bits, so 31 halvings of all bit patterns find the least such number, and it is one of the probabilities.
    """
    low = torch.zeros(len(probabilities), 1, dtype=torch.int32, device=probabilities.device)
    high = probabilities.amax(dim=-1, keepdim=True).view(torch.int32)  # nothing lies above the most likely one
    for _ in range(31):
        middle = low + (high - low) // 2
        above = torch.where(probabilities > middle.view(torch.float32), probabilities, 0.0).sum(-1, keepdim=True)
        inside = above < top_p
        low, high = torch.where(inside, low, middle + 1), torch.where(inside, middle, high)
    return high.view(torch.float32)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """One token per row of (unnormalised) probabilities (R, V), by inverting the cumulative sum at noise (R,): first
    the one of parts of PART tokens, then the one within a part."""
    rows, vocab_size = probabilities.shape
    parts = F.pad(probabilities, (0, -vocab_size % PART)).view(rows, -1, PART)
    cumulative = F.pad(parts.sum(-1).double().cumsum(-1), (1, 0))
    part, point = _place(cumulative[:, 1:].contiguous(), noise[:, None] * cumulative[:, -1:])
    within = parts.gather(1, part[..., None].expand(-1, -1, PART))[:, 0].double().cumsum(-1)
    token, _ = _place(within, point - cumulative.gather(1, part))
    return (part * PART + token)[:, 0]


def _place(cumulative: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where points (R, 1) lie in cumulative sums (R, C), never at a summand of 0; and they, below the sum of all."""
    total = cumulative[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True), point


def _noise(samplings: Sequence[Sampling], seeds: Tensor, positions: Tensor) -> Tensor | None:
    """Flat noise for positions (B, S); None where nothing is drawn."""
    return uniforms(seeds, positions).flatten() if any(one.temperature for one in samplings) else None


def _repeated(samplings: Sequence[Sampling], times: int) -> list[Sampling]:
    return [sampling for sampling in samplings for _ in range(times)]
