"""Choosing and accepting tokens: one rule for every temperature.

At each node of the draft tree the target chooses its own next token (argmax at temperature 0, else a draw). The walk
from the root follows the chosen tokens as long as they are among the node's children; the last chosen token is the
bonus. The tree is a deterministic function of the context, so what is emitted follows exactly the target's law.

Knows token ids and logits. Knows nothing of models, caches or time: every function is a pure function of tensors (and
of an explicit generator).
"""

import torch
from torch import Tensor

from fledge.decoding.records import Sampling

# N tree nodes, V target vocabulary, A accepted nodes (root included)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The target's token for each row of logits (N, V): (N,) int64."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(distribution(logits, sampling), generator)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (N, V) float32 after temperature, top-k and top-p. Tokens tied with the last kept one are kept."""
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
    return probabilities


def least_kept(probabilities: Tensor, top_p: float, at_most: int) -> Tensor:
    """The smallest probability in the nucleus: the least set of most likely tokens that holds top_p. (N, 1)

    at_most bounds the number of tokens with probability > 0, up to ties; only they are sorted.
    """
    ranked = probabilities.topk(at_most, dim=-1).values
    before = ranked.cumsum(dim=-1) - ranked  # probability held by the tokens ahead of each
    inside = (before < top_p).sum(dim=-1, keepdim=True).clamp_min(1)
    return ranked.gather(-1, inside - 1)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token per row of (unnormalised) probabilities (N, V), by inverting the cumulative sum: (N,) int64."""
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[..., -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, device=total.device, generator=generator)
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)  # right: never a token of probability 0


def accepted_nodes(token_ids: Tensor, parents: Tensor, ancestors: Tensor, chosen: Tensor) -> Tensor:
    """The walk from the root: nodes (A,) whose token, and whose ancestors' tokens, the target chose itself.

    token_ids (N,), parents (N,) with the root its own parent, ancestors (N, N) bool (row: node, itself included),
    chosen (N,): the target's token after each node. Siblings differ, so the kept nodes form one path, root first:

        chosen after root = a, after a = c          root a  b  a.c  a.d
        matches its parent's choice                  1   1  0   1    0
        and so do all its ancestors                  1   1  0   1    0      -> nodes 0, 1, 3; bonus chosen[3]

    The emitted tokens are chosen[path]: what the target chose at each kept node.
    """
    matches = token_ids == chosen[parents]
    matches[0] = True
    return (matches | ~ancestors).all(dim=-1).nonzero().squeeze(-1)
