"""Targets whose layers keep a running state: chains roll it back, and emit what plain decoding emits."""

import functools

import pytest
import torch
from tiny import HYBRIDS, ScriptedDraft, prompt, tiny_draft, tiny_model, tiny_target

from fledge.decoding import running_state
from fledge.decoding.exact import verifier_of
from fledge.decoding.generate import Sampling, TreeShape, generate, generate_batch
from fledge.decoding.running_state import RunningState, RunningStateVerifier, keeps_running_state
from fledge.decoding.verifier import AttentionVerifier
from fledge.errors import UserError
from fledge.target.model import Target

NAMES = tuple(HYBRIDS)
CHAINS = (TreeShape(6, 4, 1), TreeShape(2, 0, 1), TreeShape(9, 7, 1), TreeShape(1, 5, 10))
NEW = 40
OPTIONS = {"max_new_tokens": NEW, "sampling": Sampling(), "eos_token_ids": ()}


@functools.cache
def plain(name: str, length: int) -> list[int]:
    return generate(tiny_target(name), None, prompt(length), **OPTIONS).token_ids


def heads(name: str, ids: list[int]) -> list:
    """Never right, always right, wrong at every third token: every length of accepted chains."""
    target, script = tiny_target(name), ids + plain(name, len(ids))
    return [tiny_draft(target, "random"), ScriptedDraft(target, script), ScriptedDraft(target, script, wrong=3)]


@pytest.mark.parametrize("name", NAMES)
def test_chains_are_plain(name):
    target = tiny_target(name)
    assert isinstance(verifier_of(target, 1, 8), RunningStateVerifier)
    taken, turn = set(), 0
    for kind in range(3):
        for chain in CHAINS:
            length = (1, 20, 5)[turn % 3]
            head = heads(name, prompt(length))[kind]
            found = generate(target, head, prompt(length), tree=chain, **OPTIONS)
            assert found.token_ids == plain(name, length), (length, chain)
            taken |= set(found.accepted)
            turn += 1
    assert {0, 1, 2, 5, 8} <= taken


@pytest.mark.parametrize("name", NAMES)
def test_plain_is_the_librarys_generate(name):
    target, ids = tiny_target(name), torch.tensor([prompt(20)])
    theirs = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert plain(name, 20) == theirs[0, 20:].tolist() and len(set(plain(name, 20))) > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_prompt_alone(name):
    """Every sequence has a state of its own; a place that gets free goes to the next prompt."""
    target, lengths = tiny_target(name), (1, 20, 5)
    head = ScriptedDraft(target, *(prompt(length) + plain(name, length) for length in lengths), wrong=3)
    for one_head, batch_size in ((head, 2), (None, 3)):
        found = generate_batch(
            target, one_head, [prompt(n) for n in lengths], tree=CHAINS[0], batch_size=batch_size, **OPTIONS
        )  # fmt: skip
        assert [one.token_ids for one in found] == [plain(name, length) for length in lengths]


@pytest.mark.parametrize("waiting", [0, 3])
def test_waiting_tokens_get_a_forward_of_their_own(waiting, monkeypatch):
    monkeypatch.setattr(running_state, "MOST_WAITING", waiting)
    name, ids = "qwen3_next", prompt(5)
    found = generate(tiny_target(name), heads(name, ids)[2], ids, tree=CHAINS[0], **OPTIONS)
    assert found.token_ids == plain(name, 5)


def test_a_state_that_is_not_put_back_shows(monkeypatch):
    """Control: a wrong state does not merely cost acceptance, it changes the output."""
    name, ids = "qwen3_next", prompt(5)
    head = heads(name, ids)[2]  # and the self-test has passed
    monkeypatch.setattr(RunningState, "_put_back", lambda self, copies: None)
    found = generate(tiny_target(name), head, ids, tree=CHAINS[0], **OPTIONS)
    assert found.token_ids != plain(name, 5)


def test_trees_become_chains_and_other_targets_keep_them():
    target = tiny_target("qwen3_next")
    found = generate(target, tiny_draft(target), prompt(5), tree=TreeShape(8, 2, 3), trace=True, **OPTIONS)
    assert found.token_ids == plain("qwen3_next", 5)
    assert all(round_.parents == [0, 0, 1, 2][: len(round_.parents)] for round_ in found.rounds)
    assert not keeps_running_state(tiny_target("llama"))
    assert isinstance(verifier_of(tiny_target("llama"), 1, 8), AttentionVerifier)


def test_a_cache_of_another_kind_is_refused(monkeypatch):
    layers = ["linear_attention", "full_attention"] * 2
    differs = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": layers}
    monkeypatch.setitem(HYBRIDS, "minimax", ("MiniMaxConfig", differs))
    target = Target(tiny_model("minimax"), tap_layers=(1, 2, 3), name="tiny-minimax")
    with pytest.raises(UserError, match="a cache of their own kind"):
        generate(target, None, prompt(5), **OPTIONS)
