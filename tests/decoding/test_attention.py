"""The attention used while decoding, against the slow twin in transformers."""

from types import SimpleNamespace

import pytest
import torch
from tiny import prompt, tiny_target
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.decoding import attention
from fledge.decoding.attention import NAME, decoding_attention, grouped_attention
from fledge.target import native


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows, masked", [(1, False), (1, True), (6, True), (6, False)])
def test_it_is_transformers_sdpa(dtype, tolerance, rows, masked):
    generator = torch.Generator().manual_seed(rows)
    keys = 6 if not masked else 17  # no mask: one row, or a causal block on an empty cache
    query = torch.randn(1, 6, rows, 16, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, keys, 16, generator=generator).to(dtype) for _ in "kv")
    hidden = torch.rand(1, 1, rows, keys, generator=generator) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(1, 1, rows, keys, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min) if masked else None
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == theirs.shape == (1, rows, 6, 16)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("rows, keys, by_the_loop", [(9, 9, True), (12, 12, False), (9, 12, False)])
def test_a_prompt_goes_through_the_compiled_loop_while_it_is_short(rows, keys, by_the_loop, monkeypatch):
    """The numbers of transformers, whoever computes them; rows behind cached keys are no causal block of that size."""
    monkeypatch.setattr(attention, "MOST_ROWS", 10)
    monkeypatch.setattr(native, "attention_is_faster", lambda: True)
    query, key, value = (torch.randn(2, heads, size, 16) for heads, size in ((6, rows), (2, keys), (2, keys)))
    calls, attend = [], native.attend
    monkeypatch.setattr(native, "attend", lambda *args, **more: calls.append(args) or attend(*args, **more))
    with torch.inference_mode():
        ours, _ = grouped_attention(SimpleNamespace(), query, key, value, None, scaling=0.3)
        alike = {"num_key_value_groups": 3, "is_causal": True}
        theirs, _ = sdpa_attention_forward(SimpleNamespace(**alike), query, key, value, None, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert bool(calls) == by_the_loop


def test_what_it_does_not_know_goes_to_transformers(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: called.append(kwargs) or (0, None))
    one = torch.zeros(1, 1, 1, 4)
    grouped_attention(None, one, one, one, None, position_bias=one)
    assert called


def test_it_is_in_place_only_while_decoding():
    target = tiny_target("llama")
    with decoding_attention(target.model, target.text_config):
        assert target.text_config._attn_implementation == NAME
        inside = target.forward(torch.tensor([prompt(9)])).last_hidden
    assert target.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(inside, target.forward(torch.tensor([prompt(9)])).last_hidden, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), decoding_attention(target.model, target.text_config):
        raise ZeroDivisionError
    assert target.text_config._attn_implementation == "sdpa"


def test_eager_models_keep_their_own():
    target = tiny_target("gpt_oss")  # attention sinks
    with decoding_attention(target.model, target.text_config):
        assert target.text_config._attn_implementation == "eager"
