"""Choosing and accepting, against transformers' processors, exact frequencies and a drawn tree."""

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fledge.decoding import accept as module
from fledge.decoding.accept import accept, accepted_nodes, choose, distribution, draw, walk
from fledge.decoding.records import Sampling
from fledge.decoding.tree import Tree, ancestors_of


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 20, 0.9), (1.3, 5, 1.0), (0.5, 0, 0.3)])
def test_distribution_is_transformers(temperature, top_k, top_p):
    logits = random_logits(16, 200)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = distribution(logits, Sampling(temperature, top_p, top_k))
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, scores.softmax(-1))


def test_top_k_larger_than_the_vocabulary_keeps_all():
    logits = random_logits(2, 8)
    assert torch.equal(distribution(logits, Sampling(1.0, top_k=50)), logits.softmax(-1))


def test_a_tiny_nucleus_keeps_the_best_token():
    assert (distribution(random_logits(4, 50), Sampling(1.0, top_p=1e-9)) > 0).sum(-1).tolist() == [1, 1, 1, 1]


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0]])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(probabilities.expand(20_000, -1), generator), minlength=5)
    torch.testing.assert_close(counts / 20_000, probabilities[0], atol=0.02, rtol=0)
    assert counts[1] == counts[4] == 0


def test_draws_need_no_normalisation_and_never_leave_the_vocabulary():
    probabilities = torch.tensor([[0.0, 1e-7, 0.0]]).expand(1000, -1)
    assert draw(probabilities, torch.Generator().manual_seed(1)).unique().tolist() == [1]


def test_the_generator_decides():
    logits = random_logits(8, 100)
    once, again, other = (
        choose(logits, Sampling(1.0), torch.Generator().manual_seed(seed)).tolist() for seed in (5, 5, 6)
    )
    assert once == again != other


def test_temperature_zero_is_argmax():
    logits = random_logits(8, 100)
    assert torch.equal(choose(logits, Sampling()), logits.argmax(-1))


def test_a_nucleus_wider_than_the_first_guess(monkeypatch):
    """The short sort is only a short cut: the same tokens are kept."""
    flat, peaked = 0.01 * random_logits(3, 300), 2 * random_logits(3, 300, seed=1)
    for logits in (flat, peaked, torch.cat((flat, peaked))):
        whole = distribution(logits, Sampling(1.0, top_p=0.8))
        monkeypatch.setattr(module, "NUCLEUS_GUESS", 20)
        assert torch.equal(distribution(logits, Sampling(1.0, top_p=0.8)), whole)
        monkeypatch.undo()


def tree_of(token_ids: list[int], parents: list[int]) -> Tree:
    parents_t = torch.tensor(parents)
    zeros = torch.zeros_like(parents_t)  # levels play no part in acceptance
    return Tree(torch.tensor(token_ids), parents_t, zeros, ancestors_of(parents_t, len(parents)))


# root 9 -> a b; a -> c d; c -> e        nodes: root a b c d e
TREE = tree_of([9, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 3])


def certain(chosen: list[int]) -> torch.Tensor:
    """Logits under which even a draw takes these tokens."""
    return torch.zeros(len(chosen), 12).scatter(1, torch.tensor(chosen)[:, None], 1e4)


@pytest.mark.parametrize(
    "chosen, path",
    [
        ([1, 3, 0, 5, 0, 7], [0, 1, 3, 5]),  # all the way to e
        ([1, 4, 0, 5, 0, 7], [0, 1, 4]),  # a, then d; what c would choose does not matter
        ([2, 3, 0, 5, 0, 7], [0, 2]),  # b; a's subtree agrees with itself but hangs off a refused node
        ([8, 3, 0, 5, 0, 7], [0]),  # nothing: the bonus alone
        ([9, 3, 0, 5, 0, 7], [0]),  # the root's own token is no child of the root
    ],
)
def test_the_walk_from_the_root(chosen, path):
    emitted = [chosen[node] for node in path]
    assert accepted_nodes(TREE, torch.tensor(chosen)).tolist() == path
    for sampling in (Sampling(), Sampling(1.0, seed=0)):
        found = accept(TREE, certain(chosen), sampling)
        assert (found[0].tolist(), found[1].tolist()) == (path, emitted)


def test_both_walks_agree_on_random_trees():
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(200):
        num_nodes = int(torch.randint(1, 20, (), generator=generator))
        parents = [0] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, num_nodes)]
        tokens = [11] + [
            sum(parents[other] == parents[node] for other in range(1, node)) for node in range(1, num_nodes)
        ]
        tree = tree_of([min(token, 10) for token in tokens], parents)
        chosen = torch.randint(0, 3, (num_nodes,), generator=generator)
        path, emitted = walk(tree, certain(chosen.tolist()), Sampling(1.0), None)
        assert accepted_nodes(tree, chosen).tolist() == path.tolist()
        assert chosen[path].tolist() == emitted.tolist()
        lengths.add(len(path))
    assert len(lengths) > 3
