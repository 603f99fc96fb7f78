"""The draft tree of one round: which candidates are verified, and who descends from whom.

Knows parents, levels and scores. Knows nothing of models or tokens' meaning.

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
from torch import Tensor

# N tree nodes, C candidates


@dataclass(frozen=True)
class Tree:
    """Node 0 is the root, the last emitted token; parents precede children."""

    token_ids: Tensor  # (N,) target ids
    parents: Tensor  # (N,) int64; the root is its own parent
    levels: Tensor  # (N,) int64; 0 for the root
    ancestors: Tensor  # (N, N) bool; row: node; True for its ancestors and itself

    def __len__(self) -> int:
        return self.token_ids.shape[0]


def root_only(token_id: Tensor) -> Tree:
    """The tree of a round without drafting: token_id (1,)."""
    zero = torch.zeros_like(token_id)
    return Tree(token_id, zero, zero, torch.ones(1, 1, dtype=torch.bool, device=token_id.device))


def select(scores: Tensor, num_nodes: int) -> Tensor:
    """The best `num_nodes` of the candidates' scores (C,), in ascending order of index.

    Candidates stand level by level, so a parent stands before its children, and no child scores higher than its
    parent; the stable sort keeps the parent on a tie. Hence the choice is closed under parents.
    """
    best = scores.sort(descending=True, stable=True).indices[:num_nodes]
    return best.sort().values


def build(root: Tensor, token_ids: Tensor, parents: Tensor, levels: Tensor, chosen: Tensor, num_levels: int) -> Tree:
    """The tree of the chosen candidates (ascending indices).

    root (1,); token_ids, parents, levels (C,) of all candidates; parents are candidate indices, -1 for the root.
    """
    zero = torch.zeros_like(root)
    node_of_parent = torch.searchsorted(chosen, parents[chosen]) + 1
    node_of_parent = node_of_parent.masked_fill(parents[chosen] < 0, 0)
    node_parents = torch.cat((zero, node_of_parent))
    return Tree(
        token_ids=torch.cat((root, token_ids[chosen])),
        parents=node_parents,
        levels=torch.cat((zero, levels[chosen])),
        ancestors=ancestors_of(node_parents, num_levels),
    )


def ancestors_of(parents: Tensor, num_levels: int) -> Tensor:
    """(N, N) bool: row i is True at node i and all its ancestors. Each step doubles the number of generations seen.

    parents = [0, 0, 0, 1]:

        root  1 . . .
        a     1 1 . .
        b     1 . 1 .
        a.c   1 1 . 1
    """
    seen = torch.eye(parents.shape[0], dtype=torch.bool, device=parents.device)
    jump = parents
    reach = 1  # seen covers reach - 1 generations above each node; jump leads reach generations up
    while reach <= num_levels:
        seen = seen | seen[jump]
        jump = jump[jump]
        reach *= 2
    return seen
