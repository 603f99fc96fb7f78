"""Draft trees of B sequences: which candidates are verified, and who descends from whom.

Knows parents, levels and scores. Knows nothing of models or tokens' meaning. A chain is a tree with one child each, and
plain decoding a tree of one node. All sequences of a batch have the same number of nodes:

    candidates, level by level           scores (cumulative log-probability)
      root -> a b                         a -0.1   b -2.5
      a -> c d,  b -> e f                 c -0.4   d -1.9   e -2.6   f -4.0

    total_token = 4 keeps the root and the 3 best: a, c, d (closed under parents: a child never beats its parent)

      node    0     1    2    3
      token   root  a    c    d
      parent  0     0    1    1
      level   0     1    2    2
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.errors import UserError
from fledge.ranges import Count, Natural, TreeNodes
from fledge.target import card

MOST_WIDTH = 32  # of a beam, for the kernel that picks one after the other

# B sequences, N tree nodes, C candidates


@dataclass(frozen=True)
class TreeShape:
    """The draft tree of every round. top_k = 1 drafts a chain of min(depth + 1, total_token - 1) tokens."""

    total_token: TreeNodes = 60
    """nodes verified per round, the root (last round's bonus token) included; 1, of a round, drafts nothing"""
    depth: Natural = 5
    """draft rounds after the first level: depth + 1 levels, at most depth + 2 tokens per round"""
    top_k: Count = 10
    """children per node, and nodes expanded per level"""

    def __post_init__(self) -> None:
        if self.total_token < 1 or self.depth < 0 or self.top_k < 1:
            raise UserError(
                f"tree total_token={self.total_token}, depth={self.depth}, top_k={self.top_k}: needed are "
                f"total_token >= 1, depth >= 0 and top_k >= 1."
            )

    @property
    def levels(self) -> int:
        """Levels drafted below the root: a level deeper than the number of drafted nodes cannot be reached."""
        return min(self.depth + 1, self.total_token - 1)


def best_scores(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and draft ids (.., k) of the best of each row of logits (.., D).

    A draft that overflows still gives a well-formed tree: NaN would break the order `build_trees` relies on.
    """
    if width <= MOST_WIDTH and card.fits(logits):
        from fledge.drafters import kernels

        return kernels.best_scores(logits, width)
    best = logits.float().log_softmax(-1).topk(width, dim=-1)
    return best.values.nan_to_num_(nan=float("-inf"), neginf=float("-inf")), best.indices


@dataclass(frozen=True)
class Trees:
    """Node 0 is the root of each sequence, its last emitted token; parents precede children."""

    token_ids: Tensor  # (B, N) target ids
    parents: Tensor  # (B, N) int64; the root is its own parent
    levels: Tensor  # (B, N) int64; 0 for the root
    ancestors: Tensor  # (B, N, N) bool; row: node; True for its ancestors and itself
    scores: Tensor | None = None  # (B, N) log of the chance the drafter gives each node; None: it gives none

    @property
    def num_nodes(self) -> int:
        return self.token_ids.shape[1]


def roots_only(token_ids: Tensor) -> Trees:
    """Trees of a round without drafting: token_ids (B, 1)."""
    zero = torch.zeros_like(token_ids)
    return Trees(token_ids, zero, zero, torch.ones_like(token_ids, dtype=torch.bool)[..., None])


def chains(token_ids: Tensor) -> Trees:
    """Trees without branches: token_ids (B, N), each the child of the one before it."""
    batch, num_nodes = token_ids.shape
    nodes = torch.arange(num_nodes, device=token_ids.device)
    lower = torch.ones(num_nodes, num_nodes, dtype=torch.bool, device=token_ids.device).tril()
    parents = (nodes - 1).clamp_min(0)
    return Trees(
        token_ids, parents.expand(batch, -1), nodes.expand(batch, -1), lower.expand(batch, -1, -1)
    )  # fmt: skip


def first_nodes(trees: Trees, count: int) -> Trees:
    """Their first `count` nodes: trees themselves, since parents precede children."""
    return Trees(
        trees.token_ids[:, :count], trees.parents[:, :count], trees.levels[:, :count],
        trees.ancestors[:, :count, :count], None if trees.scores is None else trees.scores[:, :count],
    )  # fmt: skip


def filled_up(trees: Trees, multiple: int) -> Trees:
    """With copies of the last node, each the child of the one before it, until the nodes are a multiple."""
    missing = -trees.num_nodes % multiple
    if not missing:
        return trees
    batch, last = trees.token_ids.shape[0], trees.num_nodes - 1
    steps = torch.arange(missing, device=trees.parents.device).expand(batch, -1)
    its_line = trees.ancestors[:, -1:].expand(-1, missing, -1)
    own = torch.ones(missing, missing, dtype=torch.bool, device=trees.parents.device).tril().expand(batch, -1, -1)
    return Trees(
        torch.cat((trees.token_ids, trees.token_ids[:, -1:].expand(-1, missing)), dim=1),
        torch.cat((trees.parents, last + steps), dim=1),
        torch.cat((trees.levels, trees.levels[:, -1:] + 1 + steps), dim=1),
        torch.cat((F.pad(trees.ancestors, (0, missing)), torch.cat((its_line, own), dim=2)), dim=1),
    )  # what is only verified needs no scores


def candidate_levels(width: int, num_levels: int) -> Tensor:
    """Level of every candidate (C,): `width` of level 1, then `width` squared per level."""
    levels = [1] * (width if num_levels else 0)
    for level in range(2, num_levels + 1):
        levels += [level] * width * width
    return torch.tensor(levels, dtype=torch.int64)


def build_trees(
    roots: Tensor, token_ids: Tensor, parents: Tensor, levels: Tensor, scores: Tensor, num_drafted: int, num_levels: int
) -> Trees:
    """The trees of the best `num_drafted` candidates of each sequence.

    roots (B, 1); token_ids, parents, scores (B, C) of all candidates, level by level; levels (C,); parents are
    candidate indices, -1 for the root. Candidates stand level by level, so a parent stands before its children, and no
    child scores higher than its parent; the stable sort keeps the parent on a tie. Hence the choice is closed under
    parents.
    """
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_drafted]
    chosen = best.sort(dim=-1).values
    parent_of = parents.gather(1, chosen)
    node_of_parent = (torch.searchsorted(chosen, parent_of) + 1).masked_fill(parent_of < 0, 0)
    zero = torch.zeros_like(roots)
    node_parents = torch.cat((zero, node_of_parent), dim=1)
    return Trees(
        token_ids=torch.cat((roots, token_ids.gather(1, chosen)), dim=1),
        parents=node_parents,
        levels=torch.cat((zero, levels[chosen]), dim=1),
        ancestors=ancestors_of(node_parents, num_levels),
        scores=torch.cat((torch.zeros_like(scores[:, :1]), scores.gather(1, chosen)), dim=1),
    )


def ancestors_of(parents: Tensor, num_levels: int) -> Tensor:
    """(B, N, N) bool: row i is True at node i and all its ancestors. Each step doubles the number of generations seen.

    parents = [[0, 0, 0, 1]]:

        root  1 . . .
        a     1 1 . .
        b     1 . 1 .
        a.c   1 1 . 1
    """
    batch, num_nodes = parents.shape
    seen = torch.eye(num_nodes, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    jump, reach = parents, 1  # seen covers reach - 1 generations above each node; jump leads reach generations up
    while reach <= num_levels:
        seen = seen | seen.gather(1, jump[..., None].expand(-1, -1, num_nodes))
        jump = jump.gather(1, jump)
        reach *= 2
    return seen
