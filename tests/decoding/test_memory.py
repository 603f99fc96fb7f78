"""Keys and values that do not fit are refused before a prompt is read, with what they need and what there is."""

import pytest
import torch
from tiny import HYBRIDS, prompt, tiny_model, tiny_target

from fledge.decoding import memory
from fledge.decoding import session as module
from fledge.decoding.cache import TargetCache, layout_of
from fledge.decoding.generate import drop_sessions, generate, generate_batch, serving_session
from fledge.decoding.memory import bytes_per_token, check_memory, described, free_bytes
from fledge.decoding.probe import ability_of
from fledge.decoding.requests import Request
from fledge.errors import UserError
from fledge.target.model import Target


@pytest.fixture
def target() -> Target:
    target = tiny_target("llama")
    ability_of(target)  # the self-test reads tokens
    drop_sessions(target)  # what a kept session holds is not asked for again
    return target


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_the_need_is_what_a_cache_takes(name):
    target = tiny_target(name)
    cache = TargetCache(layout_of(target), target.num_layers, 3, 100)
    assert bytes_per_token(target) * 3 * 100 == cache.num_bytes > 0


def test_the_library_s_cache_grows_by_itself():
    target = Target(tiny_model(next(iter(HYBRIDS))), tap_layers=(1, 2, 3), name="hybrid")
    assert bytes_per_token(target) == 0


def test_what_does_not_fit_is_refused_before_anything_is_read(target, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 5 << 20)
    few, prompts = dict(max_new_tokens=20, eos_token_ids=()), [prompt(5)] * 9
    with monkeypatch.context() as patch:
        patch.setattr(target, "forward", None)
        with pytest.raises(UserError, match=r"9 sequences of 512 tokens need 9.0 MiB, and 5.0 MiB of memory are"):
            generate_batch(target, None, prompts, **few)
    assert len(generate_batch(target, None, prompts, batch_size=2, **few)) == 9, "fewer at once fit"


def test_a_session_that_grows_past_the_memory_says_so(target, monkeypatch):
    """Its requests are not known when it opens, so it is looked at before every growth."""
    monkeypatch.setattr(module, "BUCKET", 16)
    session = serving_session(target, batch_size=2, eos_token_ids=())
    session.add(Request(prompt(5), 3))
    session.run()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    session.add(Request(prompt(5), 3))
    session.run()  # what it has is enough
    session.add(Request(prompt(20), 3))
    with pytest.raises(UserError, match="2 sequences of 32 tokens need 128.0 KiB, and 0.0 B"):
        session.run()


def test_memory_of_this_machine(target):
    assert free_bytes(torch.device("cpu")) > 100 << 20
    check_memory(target, 4, 256)
    assert "keys and values for every 1000 tokens of theirs" in described(target, 4)
    assert generate(target, None, prompt(5), max_new_tokens=3, eos_token_ids=()).token_ids
