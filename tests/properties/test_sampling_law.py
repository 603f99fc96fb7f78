"""Sampled speculative output follows the target's own law: a chi-square test over the first three tokens.

The law is computed exactly, from the target's probabilities after every prefix; the vocabulary is small enough.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from scipy import stats
from tiny import tiny_draft, tiny_model
from transformers import RepetitionPenaltyLogitsProcessor

from fledge.decoding import accept as accept_module
from fledge.decoding import round
from fledge.decoding.accept import accept, distribution
from fledge.decoding.generate import Sampling, ShapePolicy, TreeShape, generate, generate_batch
from fledge.decoding.round import Round
from fledge.target.model import Target

VOCAB, LENGTH, DRAWS = 8, 3, 1000
IDS = [5, 2, 7]
SETTINGS = {
    "T=1": Sampling(1.0), "T=0.7 top-p 0.9 top-k 20": Sampling(0.7, 0.9, 20),
    "T=1 penalty 4": Sampling(1.0, repetition_penalty=4.0),
    "T=0.8 min-p 0.15 penalty 1.5": Sampling(0.8, min_p=0.15, repetition_penalty=1.5),
}  # fmt: skip


@functools.cache
def small_target() -> Target:
    model = tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=1, initializer_range=0.08)
    return Target(model, tap_layers=(0,), name="eight-tokens")


@functools.cache
def law(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of three tokens."""
    target = small_target()
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(LENGTH):
        prefixes = list(itertools.product(range(VOCAB), repeat=length))
        batch = torch.tensor([IDS + list(prefix) for prefix in prefixes])
        logits = target.head(target.forward(batch, taps=False).last_hidden[:, -1])
        rows = distribution(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(batch, logits), sampling)
        rows = rows / rows.sum(-1, keepdim=True)
        for prefix, row in zip(prefixes, rows.tolist(), strict=True):
            probabilities |= {(*prefix, token): probabilities[prefix] * p for token, p in enumerate(row)}
    return {sequence: p for sequence, p in probabilities.items() if len(sequence) == LENGTH and p > 0}


def p_value(sequences: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test; sequences expected fewer than five times are counted together."""
    assert set(sequences) <= set(expected), "a sequence the target cannot emit"
    counts = {sequence: 0 for sequence in expected}
    for sequence in sequences:
        counts[sequence] += 1
    common = [sequence for sequence, p in expected.items() if p * DRAWS >= 5]
    assert len(common) > 10, "too few sequences to tell laws apart"
    observed = [counts[sequence] for sequence in common]
    wanted = [expected[sequence] * DRAWS for sequence in common]
    rest = DRAWS - sum(wanted)
    if rest > 1e-6:
        observed, wanted = [*observed, DRAWS - sum(observed)], [*wanted, rest]
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [value * scale for value in wanted]).pvalue)


def speculative_sequences(setting: str) -> list[tuple[int, ...]]:
    target = small_target()
    head = tiny_draft(target, draft_vocab_size=None)
    head.warm_start_head(target.head_weight)
    found, accepted = [], 0
    for seed in range(DRAWS):
        generation = generate(
            target, head, IDS, tree=TreeShape(6, 1, 3), max_new_tokens=LENGTH, eos_token_ids=(),
            sampling=replace(SETTINGS[setting], seed=seed),
        )  # fmt: skip
        found.append(tuple(generation.token_ids))
        accepted += sum(generation.accepted)
    assert accepted > DRAWS / 10, "hardly anything was accepted: the rule was not put to the test"
    return found


def all_at_once(*args, lazily, **options):
    """Acceptance as accelerators do it: the target draws at every node in parallel."""
    return accept(*args, lazily=False, **options)


@pytest.mark.parametrize("setting, in_parallel", [("T=1", False), ("T=1", True), ("T=0.7 top-p 0.9 top-k 20", False)])
def test_speculative_sampling_follows_the_targets_law(setting, in_parallel, monkeypatch):
    if in_parallel:
        monkeypatch.setattr(round, "accept", all_at_once)
    assert p_value(speculative_sequences(setting), law(SETTINGS[setting])) > 1e-3


def batch_sequences(
    setting: str, tree: TreeShape | None, shapes: ShapePolicy = "fixed", batch: int = 50
) -> list[tuple[int, ...]]:
    """Batches of the same prompt, each row with a seed of its own."""
    target = small_target()
    head = tiny_draft(target, draft_vocab_size=None)
    head.warm_start_head(target.head_weight)
    found, accepted = [], 0
    for seed in range(DRAWS // batch):
        made = generate_batch(
            target, head if tree else None, [IDS] * batch, tree=tree or TreeShape(), max_new_tokens=LENGTH,
            eos_token_ids=(), sampling=replace(SETTINGS[setting], seed=seed * batch), shapes=shapes,
        )  # fmt: skip
        found += [tuple(one.token_ids) for one in made]
        accepted += sum(sum(one.accepted) for one in made)
    assert not tree or accepted > DRAWS / 10, "hardly anything was accepted: the rule was not put to the test"
    return found


@pytest.mark.parametrize("setting, tree, shapes", [
    ("T=1", TreeShape(6, 1, 3), "fixed"), ("T=0.7 top-p 0.9 top-k 20", TreeShape(6, 1, 3), "fixed"),
    ("T=1", None, "fixed"), ("T=1 penalty 4", TreeShape(6, 1, 3), "fixed"),
    ("T=1 penalty 4", TreeShape(6, 1, 3), "exact"), ("T=0.8 min-p 0.15 penalty 1.5", TreeShape(4, 2, 1), "exact"),
])  # fmt: skip
def test_batches_follow_the_targets_law(setting, tree, shapes):
    """Fixed shapes draw at every node in parallel, exact ones along the walk."""
    assert p_value(batch_sequences(setting, tree, shapes), law(SETTINGS[setting])) > 1e-3


def test_a_batched_rule_that_favours_the_draft_is_found(monkeypatch):
    """The planted wrong rule: at every node its children's tokens are e times likelier than the target says."""
    real = Round.accept

    def wrong(self, shapes):
        trees, favoured = self.trees, torch.zeros_like(self._logits)
        rows = torch.arange(len(favoured))[:, None]
        favoured[rows, trees.parents[:, 1:], trees.token_ids[:, 1:]] = 1.0
        self._logits = self._logits + favoured
        real(self, shapes)

    monkeypatch.setattr(Round, "accept", wrong)
    assert p_value(batch_sequences("T=1", TreeShape(6, 1, 3)), law(SETTINGS["T=1"])) < 1e-6


def test_a_penalty_that_knows_no_paths_is_found(monkeypatch):
    """The planted fault: at every node the tokens of all nodes are penalised, not those on its own path."""
    monkeypatch.setattr(
        accept_module, "seen_at_nodes",
        lambda trees, seen: seen.scatter(1, trees.token_ids, True)[:, None].repeat(1, trees.num_nodes, 1),
    )  # fmt: skip
    found = batch_sequences("T=1 penalty 4", TreeShape(6, 1, 3))
    assert p_value(found, law(SETTINGS["T=1 penalty 4"])) < 1e-6


def test_plain_sampling_follows_the_targets_law():
    target, setting = small_target(), SETTINGS["T=1"]
    found = [
        tuple(
            generate(
                target, None, IDS, max_new_tokens=LENGTH, eos_token_ids=(), sampling=replace(setting, seed=seed)
            ).token_ids
        )
        for seed in range(DRAWS)
    ]
    assert p_value(found, law(setting)) > 1e-3


def test_a_rule_that_favours_the_draft_is_found(monkeypatch):
    """The planted wrong rule: three times in ten the head's favourite is accepted whatever the target drew."""
    coin = torch.Generator().manual_seed(0)

    def wrong(trees, *args, **options):
        accepted = accept(trees, *args, **options)
        if trees.num_nodes > 1 and torch.rand((), generator=coin) < 0.3:
            one = torch.ones(1, dtype=torch.int64)
            return replace(accepted, path=0 * one[None], token_ids=trees.token_ids[:, 1:2], num_accepted=one)
        return accepted

    monkeypatch.setattr(round, "accept", wrong)
    assert p_value(speculative_sequences("T=1"), law(SETTINGS["T=1"])) < 1e-6


def test_the_seed_decides():
    target = small_target()
    draw = functools.partial(generate, target, None, IDS, max_new_tokens=20, eos_token_ids=())
    first, again, other = (draw(sampling=Sampling(1.0, seed=seed)).token_ids for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(draw(sampling=Sampling(1.0)).token_ids) for _ in range(3)}) == 3  # no seed: fresh draws


def test_the_seed_decides_for_batches():
    def draw(seed: int | None) -> list[list[int]]:
        found = generate_batch(
            small_target(), None, [IDS] * 3, max_new_tokens=20, eos_token_ids=(), shapes="fixed",
            sampling=Sampling(1.0, seed=seed),
        )  # fmt: skip
        return [one.token_ids for one in found]

    first, again, other, fresh = (draw(seed) for seed in (1, 1, 2, None))
    assert first == again != other and fresh not in (first, other)
    assert first[0] != first[1] != first[2], "every row draws for itself"
