"""Draft trees of several sequences at once: the same choice, the same walk as `fledge.decoding.tree` and `accept`.

All sequences have the same number of nodes, and an accepted path has a slot for every level, so that no shape depends
on what was drafted or accepted. Knows tokens, parents and scores. Knows nothing of models or caches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# B sequences, N tree nodes, C candidates, E levels + 1, the most nodes a path has


@dataclass(frozen=True)
class Trees:
    """Node 0 is the root of each sequence; parents precede children."""

    token_ids: Tensor  # (B, N)
    parents: Tensor  # (B, N); the root is its own parent
    levels: Tensor  # (B, N)
    ancestors: Tensor  # (B, N, N) bool


def roots_only(token_ids: Tensor) -> Trees:
    """Trees of a round without drafting: token_ids (B, 1)."""
    zero = torch.zeros_like(token_ids)
    return Trees(token_ids, zero, zero, torch.ones_like(token_ids, dtype=torch.bool)[..., None])


def build_trees(
    root: Tensor, token_ids: Tensor, parents: Tensor, levels: Tensor, scores: Tensor, num_drafted: int, num_levels: int
) -> Trees:
    """The trees of the best `num_drafted` candidates of each sequence.

    root (B, 1); token_ids, parents, scores (B, C) of all candidates, level by level, levels (C,); parents are candidate
    indices, -1 for the root. Closed under parents, for the reason `fledge.decoding.tree.select` gives.
    """
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_drafted]
    chosen = best.sort(dim=-1).values
    parent_of = parents.gather(1, chosen)
    node_of_parent = (torch.searchsorted(chosen, parent_of) + 1).masked_fill(parent_of < 0, 0)
    zero = torch.zeros_like(root)
    node_parents = torch.cat((zero, node_of_parent), dim=1)
    return Trees(
        token_ids=torch.cat((root, token_ids.gather(1, chosen)), dim=1),
        parents=node_parents,
        levels=torch.cat((zero, levels[chosen]), dim=1),
        ancestors=ancestors_of_trees(node_parents, num_levels),
    )


def ancestors_of_trees(parents: Tensor, num_levels: int) -> Tensor:
    """(B, N, N) bool: row i is True at node i and all its ancestors. Each step doubles the generations seen."""
    batch, num_nodes = parents.shape
    seen = torch.eye(num_nodes, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    jump, reach = parents, 1
    while reach <= num_levels:
        seen = seen | seen.gather(1, jump[..., None].expand(-1, -1, num_nodes))
        jump = jump.gather(1, jump)
        reach *= 2
    return seen


def accepted_paths(trees: Trees, chosen: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The walk from each root along the target's choices (B, N): nodes by level (B, E), and how many they are (B,).

    A path has one node of every level down to its last; slots behind it say node 0.
    """
    matches = trees.token_ids == chosen.gather(1, trees.parents)
    matches[:, :1].fill_(True)
    on_path = (matches[:, None, :] | ~trees.ancestors).all(dim=-1)
    slot = torch.where(on_path, trees.levels, num_slots)  # the last slot takes all others, and is cut off
    nodes = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    path = torch.zeros(len(chosen), num_slots + 1, dtype=torch.int64, device=chosen.device).scatter_(1, slot, nodes)
    return path[:, :num_slots], on_path.sum(dim=-1)
