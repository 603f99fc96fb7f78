"""Trees of several sequences at once are those of each sequence alone."""

import torch

from fledge.decoding.accept import accepted_nodes
from fledge.decoding.drafting import candidate_levels
from fledge.decoding.static_tree import Trees, accepted_paths, build_trees, roots_only
from fledge.decoding.tree import Tree, build, select

WIDTH, LEVELS, BATCH, VOCAB = 3, 4, 5, 6


def candidates(generator: torch.Generator):
    """Random candidates level by level: children of a random beam, scores that never rise along a path, some tied."""
    num = WIDTH + WIDTH * WIDTH * (LEVELS - 1)
    scores, parents = torch.zeros(num), torch.full((num,), -1)
    tokens = torch.stack([torch.randperm(VOCAB, generator=generator)[:WIDTH] for _ in range(num // WIDTH)]).flatten()
    loss = torch.randint(1, 4, (num,), generator=generator) / 4
    scores[:WIDTH] = -loss[:WIDTH]
    before = torch.arange(WIDTH)
    for first in range(WIDTH, num, WIDTH * WIDTH):
        parents[first : first + WIDTH * WIDTH] = before.repeat_interleave(WIDTH)
        scores[first : first + WIDTH * WIDTH] = scores[before].repeat_interleave(WIDTH) - loss[first : first + WIDTH**2]
        before = first + scores[first : first + WIDTH * WIDTH].topk(WIDTH).indices
    return scores, tokens, parents


def alone(trees: Trees, row: int) -> Tree:
    return Tree(trees.token_ids[row], trees.parents[row], trees.levels[row], trees.ancestors[row])


def both(num_drafted: int, seed: int) -> tuple[Trees, list[Tree]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [candidates(generator) for _ in range(BATCH)]
    scores, tokens, parents = (torch.stack(parts) for parts in zip(*rows, strict=True))
    levels, roots = candidate_levels(WIDTH, LEVELS), torch.arange(BATCH)[:, None]
    one_by_one = [build(root, row[1], row[2], levels, select(row[0], num_drafted), LEVELS)
                  for root, row in zip(roots, rows, strict=True)]  # fmt: skip
    return build_trees(roots, tokens, parents, levels, scores, num_drafted, LEVELS), one_by_one


def test_built_like_each_alone():
    for seed, num_drafted in enumerate((1, 2, 7, 15, 30)):
        trees, one_by_one = both(num_drafted, seed)
        for row, expected in enumerate(one_by_one):
            for name in ("token_ids", "parents", "levels", "ancestors"):
                assert torch.equal(getattr(alone(trees, row), name), getattr(expected, name)), (name, row, num_drafted)


def test_walked_like_each_alone():
    lengths = set()
    for seed in range(20):
        trees, one_by_one = both(20, seed)
        chosen = torch.randint(0, VOCAB, (BATCH, 21), generator=torch.Generator().manual_seed(seed))
        path, count = accepted_paths(trees, chosen, LEVELS + 1)
        for row, tree in enumerate(one_by_one):
            expected = accepted_nodes(tree, chosen[row])
            assert path[row, : count[row]].tolist() == expected.tolist()
            assert not path[row, count[row] :].any()
            lengths.add(len(expected))
    assert lengths >= {1, 2, 3}


def test_a_root_alone_accepts_itself():
    path, count = accepted_paths(roots_only(torch.tensor([[4], [5]])), torch.tensor([[1], [2]]), 1)
    assert path.tolist() == [[0], [0]] and count.tolist() == [1, 1]
