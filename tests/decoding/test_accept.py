"""Choosing and accepting, against transformers' processors, exact frequencies and a drawn tree."""

from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fledge.decoding import accept as module
from fledge.decoding.accept import (
    accept,
    accepted_paths,
    choose,
    choose_all,
    distribution,
    draw,
    least_kept,
    least_kept_unsorted,
    penalised,
    seen_at_nodes,
    walk,
)
from fledge.decoding.records import Sampling
from fledge.drafters.tree import Trees, ancestors_of


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


LAWS = (
    Sampling(1.0), Sampling(0.7, 0.9, 20), Sampling(1.3, top_k=5), Sampling(0.5, 0.3), Sampling(1.0, min_p=0.2),
    Sampling(0.8, 0.95, 50, min_p=0.05), Sampling(1.0, repetition_penalty=1.4), Sampling(2.0, repetition_penalty=0.5),
    Sampling(0.8, 0.9, 30, min_p=0.1, repetition_penalty=1.2),
)  # fmt: skip


def seen_of(texts: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.zeros(len(texts), vocab, dtype=torch.bool).scatter(1, texts, True)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_distribution_is_transformers(law):
    """All processors of `generate`, in its order."""
    logits = random_logits(16, 200)
    texts = torch.randint(0, 200, (16, 40), generator=torch.Generator().manual_seed(1))
    steps = [RepetitionPenaltyLogitsProcessor(law.repetition_penalty), TemperatureLogitsWarper(law.temperature)]
    steps += [TopKLogitsWarper(law.top_k)] if law.top_k else []
    steps += [TopPLogitsWarper(law.top_p)] if law.top_p < 1 else []
    steps += [MinPLogitsWarper(law.min_p)] if law.min_p else []
    scores = logits
    for step in steps:
        scores = step(texts, scores)
    found = distribution(penalised(logits, seen_of(texts, 200), law.repetition_penalty), law)
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, scores.softmax(-1))


def test_a_penalty_moves_the_argmax_away_from_what_was_said():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-0.2, -0.1, -3.0]])
    seen, law = seen_of(torch.tensor([[0], [1]]), 3), Sampling(repetition_penalty=1.5)
    assert choose(logits, law, seen=seen).tolist() == [1, 1]
    assert choose(logits, replace(law, repetition_penalty=4.0), seen=seen).tolist() == [1, 0]
    assert choose(logits, Sampling(), seen=seen).tolist() == [0, 1]


def test_top_k_larger_than_the_vocabulary_keeps_all():
    logits = random_logits(2, 8)
    assert torch.equal(distribution(logits, Sampling(1.0, top_k=50)), logits.softmax(-1))


def test_a_tiny_nucleus_keeps_the_best_token():
    assert (distribution(random_logits(4, 50), Sampling(1.0, top_p=1e-9)) > 0).sum(-1).tolist() == [1, 1, 1, 1]


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0]])
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(probabilities.expand(20_000, -1), noise), minlength=5)
    torch.testing.assert_close(counts / 20_000, probabilities[0], atol=0.02, rtol=0)
    assert counts[1] == counts[4] == 0


def test_draws_need_no_normalisation_and_never_leave_the_vocabulary():
    probabilities = torch.tensor([[0.0, 1e-7, 0.0]]).expand(1000, -1)
    noise = torch.cat((torch.linspace(0, 1, 999, dtype=torch.float64), torch.tensor([1 - 2.0**-53])))
    assert draw(probabilities, noise).unique().tolist() == [1]


@pytest.mark.parametrize("vocab_size", [5, 256, 1000, 49152])
def test_draws_are_those_of_the_whole_cumulative_sum(vocab_size):
    """Its slow twin; probabilities of 0 among them, whole parts of 0 at the beginning, noise at both ends."""
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(200, vocab_size)).softmax(-1)
    probabilities[:, : vocab_size // 3] = 0
    noise = torch.rand(200, dtype=torch.float64)
    noise[0], noise[1] = 0.0, 1 - 2.0**-53
    cumulative = probabilities.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]
    found = draw(probabilities, noise)
    assert (found == expected).float().mean() > 0.99  # a point may lie within rounding of a token's end
    assert (probabilities.gather(1, found[:, None]) > 0).all()


def test_the_noise_decides():
    logits, noise = random_logits(8, 100), torch.rand(8, dtype=torch.float64)
    once, again, other = (choose(logits, Sampling(1.0), value).tolist() for value in (noise, noise, 1 - noise))
    assert once == again != other


def test_rows_of_several_laws():
    """A batch of requests with temperatures of their own: each row as it is chosen alone."""
    logits, noise = random_logits(6, 50), torch.rand(6, dtype=torch.float64)
    laws = [Sampling(), Sampling(1.0), Sampling(0.5, 0.9), Sampling(), Sampling(1.0, seed=3), Sampling(2.0, top_k=4)]
    alone = [int(choose(logits[row : row + 1], law, noise[row : row + 1])) for row, law in enumerate(laws)]
    assert choose_all(logits, laws, noise).tolist() == alone


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


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_a_nucleus_without_sorting(top_p):
    """What a GPU does instead of sorting the vocabulary at every node; ties among them."""
    for logits in (random_logits(6, 300), random_logits(6, 300).round(), torch.zeros(2, 40)):
        probabilities = logits.softmax(-1)
        least = least_kept(probabilities, top_p, logits.shape[-1])
        assert torch.equal(least_kept_unsorted(probabilities, top_p), least)
        if top_p == 0.5:  # control: half of the mass is not 0.51 of it
            assert not torch.equal(least_kept_unsorted(random_logits(6, 300).softmax(-1), 0.52), least)


def trees_of(token_ids: list[int], parents: list[int]) -> Trees:
    levels = [0]
    for parent in parents[1:]:
        levels.append(levels[parent] + 1)
    parents_t = torch.tensor([parents])
    return Trees(torch.tensor([token_ids]), parents_t, torch.tensor([levels]), ancestors_of(parents_t, len(parents)))


def stacked(trees: list[Trees]) -> Trees:
    names = ("token_ids", "parents", "levels", "ancestors")
    return Trees(*(torch.cat([getattr(one, name) for one in trees]) for name in names))


# root 9 -> a b; a -> c d; c -> e        nodes: root a b c d e
TREE = trees_of([9, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 3])
SLOTS = 4


def certain(chosen: torch.Tensor) -> torch.Tensor:
    """Logits (B, N, V) under which even a draw takes these tokens (B, N)."""
    return torch.zeros(*chosen.shape, 12).scatter(2, chosen[..., None], 1e4)


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
    seeds, lengths, count = torch.tensor([3]), torch.tensor([10]), len(path)
    for sampling in (Sampling(), Sampling(1.0)):
        for lazily in (False, True):
            found = accept(TREE, certain(torch.tensor([chosen])), [sampling], seeds, lengths, SLOTS, lazily=lazily)
            assert found.num_accepted.tolist() == [count]
            assert found.path[0, :count].tolist() == path and not found.path[0, count:].any()
            assert found.token_ids[0, :count].tolist() == [chosen[node] for node in path]


def test_what_has_been_seen_at_a_node():
    """What was committed, the root, and the node's own way down: not its siblings."""
    seen = seen_of(torch.tensor([[0, 9]]), 10)
    found = [row.nonzero().flatten().tolist() for row in seen_at_nodes(TREE, seen)[0]]
    assert found == [[0, 9], [0, 1, 9], [0, 2, 9], [0, 1, 3, 9], [0, 1, 4, 9], [0, 1, 3, 5, 9]]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_both_walks_agree_on_random_trees(penalty):
    """All nodes at once, and step by step; several sequences, drawn tokens, penalties and all."""
    generator = torch.Generator().manual_seed(0)
    lengths_seen = set()
    for _ in range(100):
        num_nodes = int(torch.randint(1, 20, (), generator=generator))
        trees = []
        for _ in range(3):
            parents = [0] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, num_nodes)]
            tokens = [11] + [
                min(sum(parents[other] == parents[node] for other in range(1, node)), 10)
                for node in range(1, num_nodes)
            ]
            trees.append(trees_of(tokens, parents))
        batch, slots = stacked(trees), int(max(one.levels.max() for one in trees)) + 1
        logits = 2 * torch.randn(3, num_nodes, 12, generator=generator)
        logits[..., :3] += 2
        seeds, lengths = torch.arange(3), torch.tensor([9, 4, 7])
        seen = torch.rand(3, 12, generator=generator) < 0.3
        seen[:, 11] = True
        laws = [Sampling(1.0), Sampling(repetition_penalty=penalty), Sampling(0.5, 0.8, repetition_penalty=penalty)]
        at_once = accept(batch, logits, laws, seeds, lengths, slots, lazily=False, seen=seen)
        by_steps = walk(batch, logits, laws, seeds, lengths, slots, seen)
        assert torch.equal(at_once.num_accepted, by_steps.num_accepted)
        for row, count in enumerate(at_once.num_accepted.tolist()):
            assert torch.equal(at_once.path[row, :count], by_steps.path[row, :count])
            assert torch.equal(at_once.token_ids[row, :count], by_steps.token_ids[row, :count])
            lengths_seen.add(count)
    assert len(lengths_seen) > 3


def test_a_draw_depends_on_seed_and_position_alone():
    """The same node behind another sibling, in another slot, in a longer path: the same token."""
    logits = random_logits(1, 12, seed=4)[None]
    law, roots = Sampling(1.0), trees_of([9], [0])

    def drawn(seeds: list[int], lengths: list[int], row: int) -> int:
        batch = stacked([roots] * len(seeds))
        rows = logits.expand(len(seeds), -1, -1)
        found = accept(
            batch, rows, [law] * len(seeds), torch.tensor(seeds), torch.tensor(lengths), 1, lazily=False
        )  # fmt: skip
        return int(found.token_ids[row, 0])

    alone = drawn([5], [17], 0)
    assert drawn([1, 5, 9], [3, 17, 17], 1) == alone
    assert len({drawn([5], [length], 0) for length in range(40)}) > 3, "another position draws anew"


def test_a_root_alone_accepts_itself():
    roots = stacked([trees_of([4], [0]), trees_of([5], [0])])
    path, count = accepted_paths(roots, torch.tensor([[1], [2]]), 1)
    assert path.tolist() == [[0], [0]] and count.tolist() == [1, 1]
