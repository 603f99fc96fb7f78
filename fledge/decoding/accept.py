"""Choosing and accepting tokens: one rule for every temperature.

At each node of the draft tree the target chooses its own next token (argmax at temperature 0, else a draw). The walk
from the root follows the chosen tokens as long as they are among the node's children; the last chosen token is the
bonus. The tree is a deterministic function of the context, so what is emitted follows exactly the target's law.

Knows trees, token ids and logits. Knows nothing of models, caches or time: every function is a pure function of tensors
(and of an explicit generator).
"""

import torch
from torch import Tensor

from fledge.decoding.records import Sampling
from fledge.decoding.tree import Tree

NUCLEUS_GUESS = (
    512  # tokens that usually hold top_p; sorting them costs a tenth of sorting 49152 (24 against 286 ms for 60 rows)
)

# N tree nodes, V target vocabulary, A accepted nodes (root included)


def accept(
    tree: Tree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Accepted nodes (A,), root first, and what they emit (A,): the target's choice at each; the last is the bonus.

    logits (N, V) are the target's at every node. Draws are independent, so drawing only where the walk comes by has the
    same law as drawing everywhere; it pays where a row costs more than a step (60 rows of 49152 tokens, top-p 0.9, on
    one CPU core: 24 ms for all, 0.6 ms per step of the walk).
    """
    if sampling.temperature > 0 and logits.device.type == "cpu":
        return walk(tree, logits, sampling, generator)
    chosen = choose(logits, sampling, generator)
    path = accepted_nodes(tree, chosen)
    return path, chosen[path]


def accepted_nodes(tree: Tree, chosen: Tensor) -> Tensor:
    """The walk from the root, all nodes at once: those whose token, and whose ancestors' tokens, the target chose. (A,)

    chosen (N,) is the target's token after each node. Siblings differ, so the kept nodes form one path, root first:

        chosen after root = a, after a = c          root a  b  a.c  a.d
        matches its parent's choice                  1   1  0   1    0
        and so do all its ancestors                  1   1  0   1    0      -> nodes 0, 1, 3; bonus chosen[3]
    """
    matches = tree.token_ids == chosen[tree.parents]
    matches[0] = True
    return (matches | ~tree.ancestors).all(dim=-1).nonzero().squeeze(-1)


def walk(tree: Tree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The walk from the root, step by step: the target chooses at a node when the walk comes there."""
    parents, token_ids = tree.parents.tolist(), tree.token_ids.tolist()
    child = {(parents[node], token_ids[node]): node for node in range(1, len(tree))}
    node, path, chosen = 0, [0], []
    while True:
        chosen.append(int(choose(logits[node : node + 1], sampling, generator)))
        if (node := child.get((node, chosen[-1]), -1)) < 0:
            break
        path.append(node)
    return torch.tensor(path), torch.tensor(chosen)


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
    ranked = probabilities.topk(min(at_most, NUCLEUS_GUESS), dim=-1).values
    if ranked.shape[-1] < at_most and (probabilities.is_cuda or (ranked.sum(dim=-1) < top_p).any()):
        ranked = probabilities.topk(at_most, dim=-1).values  # a wide nucleus; on a GPU sorting is cheaper than asking
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
