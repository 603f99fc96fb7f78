"""Choosing and accepting, against transformers' processors, exact frequencies and a drawn tree."""

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fledge.decoding.accept import accepted_nodes, choose, distribution, draw
from fledge.decoding.records import Sampling
from fledge.decoding.tree import ancestors_of


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


# root 9 -> a b; a -> c d; c -> e        nodes: root a b c d e
TOKENS = torch.tensor([9, 1, 2, 3, 4, 5])
PARENTS = torch.tensor([0, 0, 0, 1, 1, 3])


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
    found = accepted_nodes(TOKENS, PARENTS, ancestors_of(PARENTS, 3), torch.tensor(chosen))
    assert found.tolist() == path


def test_the_walk_agrees_with_a_loop_on_random_trees():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        num_nodes = int(torch.randint(1, 20, (), generator=generator))
        parents = [0] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, num_nodes)]
        siblings: dict[int, int] = {}
        tokens = [50]
        for node in range(1, num_nodes):
            siblings[parents[node]] = siblings.get(parents[node], -1) + 1
            tokens.append(siblings[parents[node]])
        chosen = torch.randint(0, 3, (num_nodes,), generator=generator).tolist()
        path = [0]
        while True:
            match = [n for n in range(1, num_nodes) if parents[n] == path[-1] and tokens[n] == chosen[path[-1]]]
            if not match:
                break
            path.append(match[0])
        parents_t = torch.tensor(parents)
        found = accepted_nodes(
            torch.tensor(tokens), parents_t, ancestors_of(parents_t, num_nodes), torch.tensor(chosen)
        )
        assert found.tolist() == path
