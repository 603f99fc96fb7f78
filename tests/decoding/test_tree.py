"""The drawn tree, and that any scores give a well-formed one."""

import torch

from fledge.decoding.tree import ancestors_of, build, root_only, select


def test_the_drawing():
    """The module's docstring: root -> a b; a -> c d; b -> e f; total_token = 4 keeps a, c, d."""
    scores = torch.tensor([-0.1, -2.5, -0.4, -1.9, -2.6, -4.0])
    token_ids = torch.tensor([11, 12, 13, 14, 15, 16])
    parents = torch.tensor([-1, -1, 0, 0, 1, 1])
    chosen = select(scores, 3)
    assert chosen.tolist() == [0, 2, 3]
    tree = build(torch.tensor([10]), token_ids, parents, torch.tensor([1, 1, 2, 2, 2, 2]), chosen, 2)
    assert tree.token_ids.tolist() == [10, 11, 13, 14]
    assert tree.parents.tolist() == [0, 0, 1, 1]
    assert tree.levels.tolist() == [0, 1, 2, 2]
    assert tree.ancestors.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_ancestors_of_a_deep_chain():
    parents = torch.tensor([0, *range(9)])
    assert torch.equal(ancestors_of(parents, 9), torch.ones(10, 10, dtype=torch.bool).tril())
    assert not torch.equal(ancestors_of(parents, 3), torch.ones(10, 10, dtype=torch.bool).tril())  # too few steps


def test_a_tie_keeps_the_parent():
    """Certain drafts give a child exactly its parent's score; -inf ties whole levels."""
    scores = torch.tensor([0.0, -5.0, 0.0, -float("inf"), -float("inf"), -float("inf")])
    assert select(scores, 2).tolist() == [0, 2]
    assert select(scores, 4).tolist() == [0, 1, 2, 3]


def test_a_root_alone():
    tree = root_only(torch.tensor([7]))
    assert (len(tree), tree.parents.tolist(), tree.levels.tolist(), tree.ancestors.tolist()) == (1, [0], [0], [[True]])
