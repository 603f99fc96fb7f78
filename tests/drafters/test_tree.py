"""The drawn tree, that any scores give a well-formed one, and trees of a batch beside each sequence alone."""

import torch

from fledge.drafters.tree import Trees, ancestors_of, best_scores, build_trees, candidate_levels, chains, roots_only

WIDTH, LEVELS, BATCH, VOCAB = 3, 4, 5, 6


def test_the_drawing():
    """The module's docstring: root -> a b; a -> c d; b -> e f; total_token = 4 keeps a, c, d."""
    scores = torch.tensor([[-0.1, -2.5, -0.4, -1.9, -2.6, -4.0]])
    token_ids = torch.tensor([[11, 12, 13, 14, 15, 16]])
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]])
    trees = build_trees(torch.tensor([[10]]), token_ids, parents, torch.tensor([1, 1, 2, 2, 2, 2]), scores, 3, 2)
    assert trees.token_ids.tolist() == [[10, 11, 13, 14]]
    assert trees.parents.tolist() == [[0, 0, 1, 1]]
    assert trees.levels.tolist() == [[0, 1, 2, 2]]
    assert trees.ancestors.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]


def test_ancestors_of_a_deep_chain():
    parents, lower = torch.tensor([[0, *range(9)]]), torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.equal(ancestors_of(parents, 9)[0], lower)
    assert not torch.equal(ancestors_of(parents, 3)[0], lower)  # too few steps


def test_a_tie_keeps_the_parent():
    """Certain drafts give a child exactly its parent's score; -inf ties whole levels."""
    scores = torch.tensor([[0.0, -5.0, 0.0, -float("inf"), -float("inf"), -float("inf")]])
    token_ids, levels = torch.arange(6)[None], torch.tensor([1, 1, 2, 2, 2, 2])
    parents = torch.tensor([[-1, -1, 0, 0, 1, 1]])
    for num_drafted, kept in ((2, [0, 2]), (4, [0, 1, 2, 3])):
        trees = build_trees(torch.tensor([[9]]), token_ids, parents, levels, scores, num_drafted, 2)
        assert trees.token_ids[0, 1:].tolist() == kept


def test_roots_and_chains():
    roots = roots_only(torch.tensor([[7], [8]]))
    assert (roots.num_nodes, roots.parents.tolist(), roots.levels.tolist()) == (1, [[0], [0]], [[0], [0]])
    assert roots.ancestors.tolist() == [[[True]], [[True]]]
    chain = chains(torch.tensor([[5, 6, 7]]))
    assert chain.parents.tolist() == [[0, 0, 1]] and chain.levels.tolist() == [[0, 1, 2]]
    assert torch.equal(chain.ancestors, ancestors_of(chain.parents, 2))


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


def slow_tree(scores, tokens, parents, num_drafted: int) -> dict[tuple[int, ...], int]:
    """Path of every kept node -> its number, by the definition: best scores first, earlier candidates before later."""
    kept = sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:num_drafted])
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for index in kept:
        paths[index] = (*paths[parents[index]], tokens[index])
    return {paths[index]: node for node, index in enumerate(kept, start=1)}


def paths_of(trees: Trees, row: int) -> dict[tuple[int, ...], int]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, trees.num_nodes):
        paths.append((*paths[trees.parents[row, node]], int(trees.token_ids[row, node])))
        assert trees.levels[row, node] == len(paths[node])
    return {path: node for node, path in enumerate(paths) if node}


def test_trees_of_a_batch_are_the_definitions():
    for seed, num_drafted in enumerate((1, 2, 7, 15, 30)):
        generator = torch.Generator().manual_seed(seed)
        rows = [candidates(generator) for _ in range(BATCH)]
        scores, tokens, parents = (torch.stack(parts) for parts in zip(*rows, strict=True))
        roots = torch.arange(BATCH)[:, None]
        trees = build_trees(roots, tokens, parents, candidate_levels(WIDTH, LEVELS), scores, num_drafted, LEVELS)
        for row, parts in enumerate(rows):
            scores_of, tokens_of, parents_of = (part.tolist() for part in parts)
            assert paths_of(trees, row) == slow_tree(scores_of, tokens_of, parents_of, num_drafted)


def test_best_scores_are_log_chances_and_never_nan():
    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)) * 20
    expected = logits.log_softmax(-1).topk(4)
    scores, ids = best_scores(logits, 4)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(ids, expected.indices)
    for overflow in (float("inf"), float("-inf"), float("nan")):
        scores, _ = best_scores(torch.full((1, 5), overflow), 2)
        assert scores.isneginf().all()
