"""In bf16 the text is the same with a head as without, bit for bit: trees, chains, batches, greedy and drawn.

Plain decoding and verification used to sum in different orders, so of nearly tied tokens another one was chosen, and of
30 bf16 answers 3 to 17 were plain decoding's.
"""

import functools

import pytest
import torch
from tiny import HYBRIDS, NAMES, VOCAB, ScriptedDraft, always_packed, prompt, tiny_draft, tiny_model

from fledge.decoding import exact
from fledge.decoding.exact import differing_nodes, is_exact, want_exact
from fledge.decoding.generate import Sampling, TreeShape, generate, generate_batch, seeded
from fledge.target import native, products
from fledge.target.model import Target
from fledge.target.products import accelerate

ROUTED = ("qwen3_moe", "hunyuan_v1_moe", "gpt_oss", "deepseek_v3")  # how many rows an expert gets depends on the others
NEW = 24
GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0, seed=3)
TREE, CHAIN = TreeShape(20, 4, 4), TreeShape(6, 4, 1)


@functools.cache
def target_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Target:
    target = fresh_target(name, dtype)
    want_exact(target, True)
    return target


def fresh_target(name: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Target:
    model = tiny_model(name, **sizes).to(dtype)
    taps = None if model.config.num_hidden_layers >= 7 else (1, 2, 3)
    return Target(model, tap_layers=taps, name=f"tiny-{name}")


@pytest.mark.parametrize("name, dtype", [*((name, torch.bfloat16) for name in NAMES), ("llama", torch.float16)])
def test_logits_are_the_same_bits_in_any_company(name, dtype):
    target = target_of(name, dtype)
    assert differing_nodes(target) == 0 and is_exact(target)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ROUTED])
def test_so_they_are_in_fp32(name):
    assert is_exact(target_of(name, torch.float32))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "glm4"])
def test_with_the_librarys_attention_they_are_not(name, monkeypatch):
    """Negative control. (The compiled loop, where it is faster, gives rows the same bits without being asked to.)"""
    monkeypatch.setattr(native, "attention_is_faster", lambda: False)
    assert differing_nodes(target_of(name), exact=False) > 0


@pytest.mark.parametrize("name, law", [*((name, GREEDY) for name in NAMES), ("llama", DRAWN), ("gemma3", DRAWN)])
def test_the_text_is_plain_decodings(name, law):
    target, texts = target_of(name), [prompt(length) for length in (20, 5, 33)]
    options = dict(max_new_tokens=NEW, eos_token_ids=())
    plain = [
        generate(target, None, ids, sampling=one, **options).token_ids
        for ids, one in zip(texts, seeded(law, len(texts)), strict=True)
    ]
    script = ScriptedDraft(target, *(ids + answer for ids, answer in zip(texts, plain, strict=True)), wrong=3)
    for head, shape in ((tiny_draft(target), TREE), (script, TREE), (script, CHAIN)):
        found = generate(target, head.to(torch.bfloat16), texts[0], sampling=law, tree=shape, **options)
        assert found.token_ids == plain[0], shape
    for head in (None, script):
        together = generate_batch(target, head, texts, sampling=law, tree=TREE, **options)
        assert [one.token_ids for one in together] == plain


@pytest.mark.parametrize("name", HYBRIDS)
def test_running_states_cannot_and_say_so_once(name, capsys):
    target = target_of(name)
    assert not is_exact(target) and not is_exact(target)
    assert capsys.readouterr().err.count("drafts may change a token where two are nearly tied, because its layers") == 1


def test_experts_in_fp32_say_so(capsys):
    assert not is_exact(target_of("qwen3_moe", torch.float32))
    assert "of 10 tokens are other bits in a chain or a tree than alone" in capsys.readouterr().err


@pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
def test_it_is_on_by_itself_where_it_costs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(products, "choice_for", always_packed("loop"))
    monkeypatch.setattr(native, "attention_is_faster", lambda: True)
    for name, dtype, expected in (
        ("cohere2", torch.bfloat16, False), ("qwen3_moe", torch.bfloat16, False), ("llama", torch.float32, True),
        ("gemma2", torch.bfloat16, True),
    ):  # fmt: skip
        target = fresh_target(name, dtype)
        accelerate(target.model, least_bytes=0)
        assert not is_exact(target)  # nobody has said anything
        want_exact(target, False)
        assert is_exact(target) is expected, (name, dtype)
    assert not capsys.readouterr().err
    slow = fresh_target("llama")
    accelerate(slow.model, least_bytes=0)
    monkeypatch.setattr(native, "attention_is_faster", lambda: False)
    want_exact(slow, False)
    assert not is_exact(slow)
    want_exact(target, True)
    assert is_exact(target)


def test_what_was_found_is_kept(monkeypatch):
    """The self-test runs once for a machine and a shape."""
    target = fresh_target("llama", vocab_size=VOCAB - 1)
    want_exact(target, True)
    assert is_exact(target)
    monkeypatch.setattr(exact, "obstacle_to_bits", lambda target: pytest.fail("tested again"))
    again = fresh_target("llama", vocab_size=VOCAB - 1)
    want_exact(again, True)
    assert is_exact(again)
