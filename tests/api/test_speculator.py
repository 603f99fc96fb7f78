"""`fledge.load` and what it answers: the target's own text, from every kind of target, draft and prompt."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from saved_target import byte_tokenizer
from tiny import tiny_draft, tiny_model
from tiny_vlm import picture_file, save_vlm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fledge
from fledge.api.settings import read_settings
from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.errors import UserError
from fledge.target.model import Target

CHAT = [{"role": "user", "content": "say a word"}]
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def head_dir(tiny_model_dir, tmp_path_factory) -> Path:
    target = Target.from_pretrained(str(tiny_model_dir))
    folder = tmp_path_factory.mktemp("head") / "head"
    save_draft(tiny_draft(target, draft_vocab_size=None), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def pair(tiny_model_dir, head_dir) -> fledge.Speculator:
    return fledge.load(str(tiny_model_dir), head_dir, tree=fledge.TreeShape(8, 2, 3))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def text_of(model, ids: list[int], **options) -> list[int]:
    """transformers' own answer."""
    made = model.generate(torch.tensor([ids]), **{"do_sample": False, **options})
    return made[0, len(ids) :].tolist()


def test_importing_fledge_costs_nothing():
    code = (
        "import time; start = time.perf_counter(); import fledge, sys; print(time.perf_counter() - start);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "fledge.TreeShape; assert 'torch' in sys.modules"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(seconds) < 0.2
    assert {"load", "speculate"} <= set(dir(fledge))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        fledge.lode  # noqa: B018


def test_every_kind_of_prompt_is_the_same_prompt(pair, model):
    ids = pair.tokenizer(TEXT)["input_ids"]
    expected = text_of(model, ids, max_new_tokens=24)
    encoded = pair.tokenizer([TEXT], return_tensors="pt")
    padded = {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, *[1] * len(ids)]}
    for prompt in (TEXT, ids, torch.tensor(ids), torch.tensor([ids]), encoded, padded):
        made = pair.generate(prompt, max_new_tokens=24)
        assert made.token_ids == expected
    assert made.text == pair.tokenizer.decode(expected, skip_special_tokens=True)
    assert made.tau >= 1 and made.tokens_per_s > 0 and made.finish_reason in ("stop", "length")
    rendered = pair.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert pair.generate(CHAT, max_new_tokens=9).token_ids == text_of(model, rendered, max_new_tokens=9)


def test_every_kind_of_pair_is_the_same_text(pair, head_dir, tiny_model_dir, model):
    expected = pair.generate(TEXT, max_new_tokens=24).token_ids
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    drafts = (None, "lookup", head_dir, pair.drafter)
    for draft in drafts:
        loaded = fledge.load(model, draft, tokenizer=tokenizer)
        assert loaded.generate(TEXT, max_new_tokens=24).token_ids == expected
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert fledge.load(str(tiny_model_dir), "lookup", dtype="float32", device="cpu").drafter is not None


def test_streams_and_batches_say_the_same(pair):
    prompts = [TEXT, CHAT, pair.tokenizer("a lazy dog")["input_ids"]]
    alone = [pair.generate(prompt, max_new_tokens=20, eos_token_id=[]) for prompt in prompts]
    pieces = list(pair.stream(TEXT, max_new_tokens=20, eos_token_id=[]))
    assert "".join(pieces) == alone[0].text and len(pieces) > 1
    made = pair.generate_batch(prompts, max_new_tokens=20, eos_token_id=[], batch_size=2)
    assert [one.token_ids for one in made] == [one.token_ids for one in alone]
    assert pair.generate_batch([]) == []
    stopped = pair.stream(TEXT, max_new_tokens=200, eos_token_id=[])
    next(stopped)
    stopped.close()
    assert pair.generate(TEXT, max_new_tokens=20, eos_token_id=[]).token_ids == alone[0].token_ids


def test_a_chat_may_hold_pictures(tmp_path):
    """Streamed and in a batch, too. Four layers are too few for the usual three taps; here nobody reads them."""
    target, seen = save_vlm(tmp_path / "target"), picture_file(tmp_path)
    plain, by_lookup = (fledge.load(str(target), draft, tree=fledge.TreeShape(6, 4, 1)) for draft in (None, "lookup"))
    content = [{"type": "image", "image": str(seen)}, {"type": "text", "text": "what is it"}]
    chat, options = [{"role": "user", "content": content}], {"max_new_tokens": 12, "eos_token_id": []}
    expected = plain.generate(chat, **options)
    assert by_lookup.generate(chat, **options).token_ids == expected.token_ids
    assert "".join(by_lookup.stream(chat, **options)) == expected.text
    blind = [{"role": "user", "content": "what is it"}]
    together = by_lookup.generate_batch([chat, blind], **options)
    assert [one.token_ids for one in together] == [expected.token_ids, plain.generate(blind, **options).token_ids]
    assert together[0].token_ids != together[1].token_ids


def test_several_heads_serve_one_loaded_model(pair, model):
    """Each in turn, and one of them is let go: the others go on."""
    heads = [tiny_draft(pair.target, kind) for kind in ("random", "zero", "adversarial")]
    pairs = [fledge.load(model, head, tokenizer=pair.tokenizer) for head in heads]
    options = {"max_new_tokens": 12, "eos_token_id": []}
    expected = pair.generate(TEXT, **options).token_ids
    for _ in range(2):
        assert [one.generate(TEXT, **options).token_ids for one in pairs] == [expected] * len(pairs)
        del pairs[0]
        gc.collect()


def test_draws_follow_the_seed(pair):
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "top_k": 20, "eos_token_id": []}
    once, again, other = (pair.generate(TEXT, seed=seed, **options).token_ids for seed in (5, 5, 6))
    assert once == again != other
    batch = pair.generate_batch([TEXT, TEXT], seed=5, **options)
    assert [one.token_ids for one in batch] == [once, other]


def test_a_generation_config_means_what_it_means_to_generate(pair, model):
    ids = pair.tokenizer(TEXT)["input_ids"]
    for config in (
        GenerationConfig(max_new_tokens=12),
        GenerationConfig(max_length=len(ids) + 7, num_beams=1, repetition_penalty=1.0, use_cache=False),
        GenerationConfig(max_new_tokens=30, eos_token_id=text_of(model, ids, max_new_tokens=9)[8]),
    ):
        assert pair.generate(ids, config).token_ids == text_of(model, ids, generation_config=config)
    assert len(pair.generate(ids, GenerationConfig(max_new_tokens=12), max_new_tokens=3).token_ids) <= 3
    sampled = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=12)
    wanted = pair.generate(ids, temperature=0.5, top_k=3, max_new_tokens=12, seed=1).token_ids
    assert pair.generate(ids, sampled, seed=1).token_ids == wanted
    assert pair.generate(ids, GenerationConfig(temperature=0.5, max_new_tokens=9)).token_ids == text_of(
        model, ids, max_new_tokens=9
    ), "without do_sample nothing is drawn"


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"num_beams": 4}, "num_beams=4"), ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
     ({"min_new_tokens": 5}, "min_new_tokens=5"), ({"forced_eos_token_id": 3}, "forced_eos_token_id=3"),
     ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"), ({"output_scores": True}, "output_scores"),
     ({"suppress_tokens": [5]}, "suppress_tokens"), ({"max_time": 1.0}, "max_time=1.0")],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(pair, fields, named):
    with pytest.raises(UserError, match=f"sets {named}"):
        pair.generate(TEXT, GenerationConfig(**fields))


def test_the_model_s_own_config_counts_as_in_generate(pair, monkeypatch):
    """A model may ship with settings of its own: they are refused, not dropped, with a config and without."""
    own = pair.target.model.generation_config
    with monkeypatch.context() as patch:
        patch.setattr(own, "typical_p", 0.5)
        assert pair.generate(TEXT, max_new_tokens=3).token_ids, "greedy: it changes nothing"
        with pytest.raises(UserError, match=r"typical_p=0\.5"):
            pair.generate(TEXT, max_new_tokens=3, temperature=1.0)
    monkeypatch.setattr(own, "no_repeat_ngram_size", 3)
    for config in (GenerationConfig(max_new_tokens=3), None):
        with pytest.raises(UserError, match="no_repeat_ngram_size=3"):
            pair.generate(TEXT, config, max_new_tokens=3)


def test_the_model_s_own_penalty_holds(pair, model, monkeypatch):
    """Greedy answers were not those of `model.generate` where the model ships with a repetition_penalty."""
    ids, options = pair.tokenizer(TEXT)["input_ids"], {"max_new_tokens": 24, "eos_token_id": []}
    before = pair.generate(ids, **options).token_ids
    for one in (pair.target.model, model):
        monkeypatch.setattr(one.generation_config, "repetition_penalty", 1.5)
    expected = text_of(model, ids, max_new_tokens=24, eos_token_id=-1)
    assert pair.generate(ids, **options).token_ids == expected != before
    assert pair.generate(ids, repetition_penalty=1.0, **options).token_ids == before


def test_keyword_arguments_are_the_law(pair, monkeypatch):
    own = pair.target.model.generation_config
    monkeypatch.setattr(own, "top_k", 7)
    monkeypatch.setattr(own, "min_p", 0.2)
    law = lambda **options: read_settings(None, own, options).sampling  # noqa: E731
    assert law(temperature=0.9) == Sampling(0.9, top_k=7, min_p=0.2) and law() == Sampling()
    assert law(temperature=0.9, top_k=0, min_p=0.1) == Sampling(0.9, min_p=0.1)


def test_bad_calls(pair, model, tiny_model_dir):
    for call, words in (
        (lambda: fledge.load(model), "needs its tokenizer"),
        (lambda: fledge.load(model, tokenizer=pair.tokenizer, dtype="float32"), "this model is loaded"),
        (lambda: fledge.load(str(tiny_model_dir), tokenizer=pair.tokenizer), "brings its own"),
        (lambda: fledge.load(str(tiny_model_dir), dtype="float31"), "'float31' is no number format"),
        (lambda: fledge.load(str(tiny_model_dir), model), "is no drafter"),
        (lambda: pair.generate(TEXT, temprature=1), "did you mean 'temperature'"),
        (lambda: pair.generate(TEXT, GenerationConfig(max_length=4)), "Set max_new_tokens"),
        (lambda: pair.generate(torch.zeros(2, 4, dtype=torch.int64)), "one row of integers.*generate_batch"),
        (lambda: pair.generate([0.5]), "one row of integers"),
        (lambda: pair.generate([]), "the prompt has no tokens"),
        (lambda: pair.generate({"input_ids": [5], "pixel_values": [1]}), "came with pixel_values"),
        (lambda: pair.generate_batch(TEXT), "takes a list of prompts, not a str"),
        (lambda: pair.generate([{"role": "user", "content": [{"type": "image", "image": "x"}]}]), "cannot be rendered"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_a_pair_that_goes_frees_its_sessions_and_leaves_the_model():
    """Sessions are kept for the next call and know their target: a pair that was let go kept its caches for ever."""
    model = tiny_model("llama", vocab_size=258)
    head = tiny_draft(Target(tiny_model("llama", vocab_size=258)), draft_vocab_size=None)
    pair = fledge.load(model, head, tokenizer=byte_tokenizer())
    pair.generate(TEXT, max_new_tokens=3)
    assert any(layer._forward_pre_hooks for layer in pair.target.layers), "negative control"
    target = weakref.ref(pair.target)
    layers = list(pair.target.layers)
    del pair
    gc.collect()
    assert target() is None and not any(layer._forward_pre_hooks for layer in layers)
    assert model(torch.tensor([[5]])).logits.isfinite().all()


def test_without_the_pair_the_target_stays(tiny_model_dir):
    """Negative control: sessions alone keep it."""
    target = Target.from_pretrained(str(tiny_model_dir))
    generate(target, None, [5], max_new_tokens=2)
    kept = weakref.ref(target)
    del target
    gc.collect()
    assert kept() is not None
