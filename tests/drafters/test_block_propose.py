"""Proposing with block drafts: lossless on every target, and its trees' scores are what the definition gives.

A product tree is DFlash's (no Markov head), a conditional one DSpark's.
"""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from block_reference import block_states, draft_logits, tiny_block
from tiny import NAMES, prompt, tiny_model, tiny_target

from fledge.decoding.accept import distribution
from fledge.decoding.adaptive import AdaptiveBudget
from fledge.decoding.generate import Sampling, generate, generate_batch
from fledge.drafters.base import Emitted
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.propose import BlockProposer
from fledge.drafters.tree import TreeShape, candidate_levels
from fledge.target.model import Target

CHAIN, TREE = TreeShape(7, 6, 1), TreeShape(16, 3, 3)
KINDS = [("dflash", {}), ("dspark", {}), ("dspark", {"sample_from_anchor": False, "causal": True, "sliding_window": 4})]


@pytest.mark.parametrize("name", NAMES)
def test_block_drafts_are_lossless(name):
    """Greedy output is the target's own, whatever is drafted: chains, product trees, conditional trees."""
    target, options = tiny_target(name), {"max_new_tokens": 8, "eos_token_ids": ()}
    prompts = [prompt(5), prompt(9)]
    plain = [one.token_ids for one in generate_batch(target, None, prompts, **options)]
    for draft_type, kind in itertools.product(("dflash", "dspark"), ("random", "adversarial")):
        draft = tiny_block(target, draft_type, kind)
        for shape in (CHAIN, TREE):
            found = generate_batch(target, draft, prompts, tree=shape, **options)
            assert [one.token_ids for one in found] == plain, (draft_type, kind, shape)
            assert found[0].drafted_depth == min(shape.levels, draft.config.num_drafts)


@pytest.mark.parametrize("draft_type, overrides", KINDS)
@pytest.mark.parametrize("shapes", ["exact", "fixed"])
def test_a_batch_is_lossless(draft_type, overrides, shapes):
    """Sequences of different lengths, answered in one session that they join and leave."""
    target, prompts = tiny_target("llama"), [prompt(4), prompt(20), prompt(11), prompt(7)]
    draft, options = tiny_block(target, draft_type, **overrides), {"max_new_tokens": 12, "eos_token_ids": ()}
    plain = [generate(target, None, ids, **options).token_ids for ids in prompts]
    found = generate_batch(target, draft, prompts, tree=TREE, shapes=shapes, batch_size=2, **options)
    assert [one.token_ids for one in found] == plain


def committed(target: Target, draft: BlockDraft, ids: list[int], shape: TreeShape, first: int) -> BlockProposer:
    """A proposer that has read `first` tokens as a prompt and followed the others; the last of them is the root."""
    tokens = torch.tensor(ids)
    taps = target.forward(tokens[None]).tap_hidden
    proposer = BlockProposer(draft, shape, 1, 64)
    proposer.fill(0, tokens[:first], taps[0, :first], torch.arange(first))
    for start, stop in ((first, first + 1), (first + 1, len(ids))):  # a round of one token, then all others at once
        emitted = Emitted(
            tokens[None, start:stop], torch.tensor([stop - start]), taps[:, start - 1 : stop - 1],
            torch.tensor([stop - 1]),
        )  # fmt: skip
        proposer.follow(emitted, stop + proposer.rows_ahead)
    return proposer


def paths(parents: list[int], tokens: list[int]) -> Iterator[list[int]]:
    for node in range(len(parents)):
        path = []
        while node >= 0:
            path.append(tokens[node])
            node = parents[node]
        yield path[::-1]


@pytest.mark.parametrize("draft_type, overrides", KINDS)
def test_scores_are_those_of_all_paths(draft_type, overrides):
    """Brute force: the log-chance of every path over four draft tokens, three levels deep, from the definition.

    Every candidate has the score of its path, and the candidates are the best children of the best nodes."""
    target, ids = tiny_target("llama"), prompt(12)
    draft = tiny_block(target, draft_type, draft_vocab_size=4, **overrides)
    proposer = committed(target, draft, ids, TreeShape(30, 2, 4), 5)
    scores, tokens, parents = (one[0] for one in proposer.candidates(torch.tensor([11]), 3, 20))

    taps = target.forward(torch.tensor([ids])).tap_hidden[0]
    states = block_states(draft, torch.tensor(ids), taps, torch.arange(12), 11)
    vocab = draft.target_ids(torch.arange(4)).tolist()
    expected = {}
    for length in (1, 2, 3):
        for path in itertools.product(range(4), repeat=length):
            before, total = [ids[-1], *(vocab[token] for token in path)], 0.0
            for number, token in enumerate(path):
                q = draft_logits(draft, states, number, before[number]).softmax(-1)
                trust = confidence_of(draft, states, number, before[number])
                total += math.log(q[token] * min(1.0, trust / q.max().item()))
            expected[tuple(before[1:])] = total
    found = dict(zip(map(tuple, paths(parents.tolist(), tokens.tolist())), scores.tolist(), strict=True))
    assert len(found) == len(candidate_levels(4, 3)) == 36
    for path, score in found.items():
        assert score == pytest.approx(expected[path], abs=1e-4)
    best = sorted((path for path in expected if len(path) == 2), key=expected.__getitem__)[-4:]
    assert {path[:2] for path in found if len(path) == 3} == set(best)


def confidence_of(draft: BlockDraft, states: torch.Tensor, number: int, before: int) -> float:
    """What the confidence head says of a slot's draft behind the token `before`; 1 without such a head."""
    if draft.confidence_head is None:
        return 1.0
    embedding = draft.markov_head.markov_w1.weight[before]
    return draft.confidence_head.proj(torch.cat((states[number + draft.config.first_slot], embedding))).sigmoid().item()


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_a_budget_verifies_what_the_confidence_head_believes_in(shape):
    """Sure of every slot, the head has all of a block verified; sure of none, one draft. The text is the target's."""
    target, ids = tiny_target("llama"), prompt(12)
    draft = tiny_block(target, "dspark", draft_vocab_size=4)
    draft.confidence_head.proj.weight.data.zero_()
    draft.norm.weight.data.mul_(8)  # sure of its tokens: what is left is what the confidence head says
    plain = generate(target, None, ids, max_new_tokens=16, eos_token_ids=()).token_ids
    sizes = []
    for bias in (9.0, -9.0):
        draft.confidence_head.proj.bias.data.fill_(bias)
        costs = {"verify_s": {nodes: 1 + 0.01 * nodes for nodes in range(1, 17)}, "overhead_s": 0.0}
        budget = AdaptiveBudget(plain_s=1.0, draft_s={level: 1e-3 * level for level in range(1, 9)}, **costs)
        proposer = committed(target, draft, ids, shape, 5)
        emitted = Emitted(torch.tensor([ids[-1:]]), torch.tensor([1]), None, torch.tensor([11]))
        assert budget.drafts()
        sizes.append(proposer.propose(emitted, shape.levels, 30, budget).num_nodes)
        found = generate(target, draft, ids, tree=shape, max_new_tokens=16, eos_token_ids=(), budget=budget)
        assert found.token_ids == plain
    assert sizes[0] > 5 and sizes[1] == 2


def test_conditional_branches_differ_and_product_branches_do_not():
    """Negative control of the comparison above: the Markov head is what makes children depend on their parent."""
    target, ids = tiny_target("llama"), prompt(12)
    for draft_type, is_product in (("dflash", True), ("dspark", False)):
        proposer = committed(target, tiny_block(target, draft_type), ids, TreeShape(30, 1, 3), 5)
        _, tokens, _ = proposer.candidates(torch.tensor([11]), 2, 20)
        children = tokens[0, 3:].view(3, 3)
        assert bool((children == children[0]).all()) is is_product


def test_a_proposer_that_forgets_the_window_is_noticed():
    target, ids = tiny_target("llama"), prompt(12)
    scores = [
        committed(target, tiny_block(target, "dspark", sliding_window=window), ids, TREE, 5).candidates(
            torch.tensor([11]), 2, 20
        )[0]
        for window in (None, 4)
    ]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


VOCAB, DRAWS, PROMPT = 8, 500, [5, 2, 7]


@pytest.mark.parametrize("draft_type, shape", [("dflash", CHAIN), ("dflash", TREE), ("dspark", TREE)])
def test_sampling_follows_the_targets_law(draft_type, shape):
    """Chi-square over the first two tokens at T = 1, whose law is computed from the target itself."""
    from scipy import stats

    model = tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.08)
    target, sampling = Target(model, tap_layers=(1,), name="eight-tokens"), Sampling(1.0)
    draft = tiny_block(target, draft_type, draft_vocab_size=None)
    draft.norm.weight.data.mul_(0.3)
    law = torch.zeros(VOCAB, VOCAB)
    for first in range(VOCAB):
        logits = target.head(target.forward(torch.tensor([[*PROMPT, first]])).last_hidden)[0, -2:]
        one, two = distribution(logits, sampling)
        law[first] = one[first] * two
    made = generate_batch(
        target, draft, [PROMPT] * DRAWS, tree=shape, max_new_tokens=3, eos_token_ids=(), batch_size=100,
        sampling=sampling,
    )  # fmt: skip
    assert sum(sum(one.accepted) for one in made) > DRAWS / 40, "hardly anything was accepted"
    observed = torch.zeros(VOCAB, VOCAB)
    for one in made:
        observed[one.token_ids[0], one.token_ids[1]] += 1
    assert stats.chisquare(observed.flatten(), law.flatten() * DRAWS / law.sum()).pvalue > 1e-3
    shuffled = law.roll(1, dims=0)
    assert stats.chisquare(observed.flatten(), shuffled.flatten() * DRAWS / law.sum()).pvalue < 1e-6
