"""Prompt lookup: what followed the longest recurring n-gram, by a search over the whole text."""

import math

import pytest
import torch

from fledge.drafters.base import Emitted
from fledge.drafters.lookup.propose import (
    LONGEST,
    MEMORY,
    USUAL,
    Chances,
    Continuation,
    History,
    LookupProposer,
    PromptLookup,
)
from fledge.drafters.tree import TreeShape


def slow_continuation(tokens: list[int], at_most: int) -> Continuation:
    """By the definition: every size, every earlier place, the latest first; and again behind what it has found."""
    for size in range(min(LONGEST, len(tokens)), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                found = tokens[start + size :]
                return Continuation((found * at_most)[:at_most], size)
    return Continuation([], 0)


def test_the_drawing():
    the, cat, sat, on, mat, stop = range(6)
    text = [the, cat, sat, on, the, mat, stop, the, cat]
    assert History(text).continuation(4) == Continuation([sat, on, the, mat], 2)
    assert History([the, cat, sat]).continuation(4) == Continuation([], 0)


def test_found_as_by_the_definition():
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(300):
        text = torch.randint(0, 4, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator).tolist()
        cut = len(text) // 2
        history = History(text[:cut])
        history.extend(text[cut:])
        assert history.continuation(5) == slow_continuation(text, 5)
        found.add(history.continuation(5).size)
    assert len(found) > 3


def test_chains_of_a_batch():
    """What is found at the end goes on from its beginning; a sequence that finds nothing proposes what is refused."""
    proposer = LookupProposer(PromptLookup(), TreeShape(8, 3, 1), 3)
    texts = ([1, 2, 3, 4, 1], [5, 6, 5], [7, 8])
    for slot, text in enumerate(texts):
        proposer.fill(slot, torch.tensor(text), None, torch.arange(len(text)))
    new = Emitted(torch.tensor([[2, 9], [6, 5], [9, 0]]), torch.tensor([1, 2, 1]), None, torch.tensor([5, 4, 2]))
    proposer.follow(new, 0)
    trees = proposer.propose(new, 4, 0)
    assert trees.token_ids.tolist() == [[2, 3, 4, 1, 2], [5, 6, 5, 6, 5], [9, 0, 0, 0, 0]]
    assert trees.scores is not None and trees.scores[2, 1:].exp().tolist() == [0] * 4
    assert trees.levels[0].tolist() == [0, 1, 2, 3, 4]
    proposer.move(1, 0)
    again = Emitted(torch.tensor([[6]]), torch.tensor([1]), None, torch.tensor([5]))
    proposer.follow(again, 0)
    assert proposer.propose(again, 4, 0).token_ids.tolist() == [[6, 5, 6, 5, 6]]


def test_nothing_found_is_a_root():
    proposer = LookupProposer(PromptLookup(), TreeShape(8, 3, 1), 1)
    proposer.fill(0, torch.tensor([1, 2]), None, torch.arange(2))
    new = Emitted(torch.tensor([[3]]), torch.tensor([1]), None, torch.tensor([2]))
    proposer.follow(new, 0)
    assert proposer.propose(new, 4, 0).num_nodes == 1


def test_chances_follow_the_text():
    """A right token makes the n-gram of the next longer; what comes behind the first wrong one says nothing."""
    chances = Chances()
    chances.learn(Continuation([7, 8, 9, 10], 2), [7, 8, 1])
    expected = list(USUAL)
    expected[1] = MEMORY * USUAL[1] + 1 - MEMORY  # an n-gram of 2: right
    expected[2] = MEMORY * USUAL[2] + 1 - MEMORY
    expected[3] = MEMORY * USUAL[3]  # of 4: wrong
    assert chances.along(Continuation([0] * 5, 1)) == pytest.approx(
        [math.log(math.prod(expected[: count + 1])) for count in range(5)]
    )
    long = chances.along(Continuation([0] * 3, LONGEST))
    assert long == pytest.approx([(count + 1) * math.log(expected[-1]) for count in range(3)])


def test_chances_stay_chances():
    chances = Chances()
    for _ in range(2000):
        chances.learn(Continuation([1], 1), [2])
    (score,) = chances.along(Continuation([1], 1))
    assert math.isfinite(score) and math.exp(score) < 0.01


def test_a_proposer_learns_from_what_was_emitted():
    """Also from drafts that nobody verified, and not twice from the same."""
    proposer = LookupProposer(PromptLookup(), TreeShape(8, 3, 1), 1)
    proposer.fill(0, torch.tensor([1, 2, 3, 1]), None, torch.arange(4))

    def follow(*tokens: int) -> torch.Tensor | None:
        new = Emitted(torch.tensor([tokens]), torch.tensor([len(tokens)]), None, torch.tensor([4]))
        proposer.follow(new, 0)
        return proposer.propose(new, 2, 0).scores

    scores = follow(2)
    assert scores is not None and scores[0].tolist() == pytest.approx(
        [0, math.log(USUAL[1]), sum(map(math.log, USUAL[1:3]))]
    )
    again = follow(3)
    assert again is not None and again[0, 1].item() == pytest.approx(math.log(USUAL[2]))
    assert proposer._chances._by_size[1] == pytest.approx(MEMORY * USUAL[1] + 1 - MEMORY)
    proposer.follow(Emitted(torch.tensor([[9]]), torch.tensor([1]), None, torch.tensor([6])), 0)
    proposer.follow(Emitted(torch.tensor([[9]]), torch.tensor([1]), None, torch.tensor([7])), 0)
    assert proposer._chances._by_size[2] == pytest.approx(MEMORY * USUAL[2])
