"""Prompt lookup: what followed the longest recurring n-gram, by a search over the whole text."""

import torch

from fledge.drafters.base import Emitted
from fledge.drafters.lookup.propose import LONGEST, History, LookupProposer, PromptLookup
from fledge.drafters.tree import TreeShape


def slow_continuation(tokens: list[int], at_most: int) -> list[int]:
    """By the definition: every size, every earlier place, the latest first."""
    for size in range(min(LONGEST, len(tokens)), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + at_most]
    return []


def test_the_drawing():
    the, cat, sat, on, mat, stop = range(6)
    text = [the, cat, sat, on, the, mat, stop, the, cat]
    assert History(text).continuation(4) == [sat, on, the, mat]
    assert History([the, cat, sat]).continuation(4) == []


def test_found_as_by_the_definition():
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(300):
        text = torch.randint(0, 4, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator).tolist()
        cut = len(text) // 2
        history = History(text[:cut])
        history.extend(text[cut:])
        assert history.continuation(5) == slow_continuation(text, 5)
        found.add(len(history.continuation(5)))
    assert len(found) > 3


def test_chains_of_a_batch():
    """A sequence that finds less is filled up; one that finds nothing proposes something that will be refused."""
    proposer = LookupProposer(PromptLookup(), TreeShape(8, 3, 1), 3)
    texts = ([1, 2, 3, 4, 1], [5, 6, 5], [7, 8])
    for slot, text in enumerate(texts):
        proposer.fill(slot, torch.tensor(text), None, torch.arange(len(text)))
    new = Emitted(torch.tensor([[2, 9], [6, 5], [9, 0]]), torch.tensor([1, 2, 1]), None, torch.tensor([5, 4, 2]))
    proposer.follow(new, 0)
    trees = proposer.propose(new, 4, 0)
    assert trees.token_ids[0].tolist() == [2, 3, 4, 1, 2] and trees.token_ids[1].tolist() == [5, 6, 5, 5, 5]
    assert trees.levels[0].tolist() == [0, 1, 2, 3, 4]
    proposer.move(1, 0)
    again = Emitted(torch.tensor([[6]]), torch.tensor([1]), None, torch.tensor([5]))
    proposer.follow(again, 0)
    assert proposer.propose(again, 4, 0).token_ids.tolist() == [[6, 5, 6]]


def test_nothing_found_is_a_root():
    proposer = LookupProposer(PromptLookup(), TreeShape(8, 3, 1), 1)
    proposer.fill(0, torch.tensor([1, 2]), None, torch.arange(2))
    new = Emitted(torch.tensor([[3]]), torch.tensor([1]), None, torch.tensor([2]))
    proposer.follow(new, 0)
    assert proposer.propose(new, 4, 0).num_nodes == 1
