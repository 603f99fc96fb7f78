"""What the target's generation_config asks of sampling, and what flags make of it."""

import json

import pytest

from fledge.data.sampling import ExtraSampling, describe, read_generation_config, resolve_extra
from fledge.errors import UserError


def target(folder, **config):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True, **config}))
    return str(folder)


def test_what_a_generation_config_asks_for(tmp_path):
    asked = read_generation_config(target(tmp_path, temperature=0.6, top_k=20, repetition_penalty=1.05, top_p=0.95))
    assert asked == {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "top_k": 20}
    assert resolve_extra(ExtraSampling(), asked) == ExtraSampling(repetition_penalty=1.05, top_k=20)
    flags = ExtraSampling(top_k=0, min_p=0.1)
    assert resolve_extra(flags, asked) == ExtraSampling(repetition_penalty=1.05, top_k=0, min_p=0.1)


def test_neutral_values_ask_for_nothing(tmp_path):
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "top_p": 1.0, "typical_p": 1.0, "no_repeat_ngram_size": 0}
    assert read_generation_config(target(tmp_path, **neutral)) == {}
    assert read_generation_config(target(tmp_path, top_k=-1)) == {"top_k": 0}  # all tokens, in vLLM's words


def test_a_config_that_is_not_here_is_said(tmp_path):
    assert read_generation_config(str(tmp_path / "missing")) is None
    assert read_generation_config("a name/of no/hub model") is None
    (sampled, unknown) = describe(ExtraSampling(), None, temperature="0.7", top_p=1.0)
    assert sampled == "sampling: temperature 0.7, top_p 1" and "a server applies its own" in unknown


def test_what_differs_from_the_config_is_said():
    asked = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "typical_p": 0.9}
    extra = resolve_extra(ExtraSampling(), asked)
    sampled, differs = describe(extra, asked, temperature="0.6", top_p=1.0)
    assert sampled == "sampling: temperature 0.6, top_p 1, top_k 20"
    assert differs == "the target's generation_config asks for top_p 0.95, typical_p 0.9, which is not used here"
    assert len(describe(extra, {"top_k": 20}, temperature="0.6", top_p=1.0)) == 1


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(UserError, match=r"generation_config.json: Expected `int \| null`, got `str` - at `\$.top_k`"):
        read_generation_config(str(tmp_path))


def test_what_fledge_cannot_apply_is_known_by_name(tmp_path):
    """Settings beyond the five were passed over in silence."""
    more = {"no_repeat_ngram_size": 3, "suppress_tokens": [4, 5], "bad_words_ids": [], "num_beams": 4, "min_length": 0}
    asked = read_generation_config(target(tmp_path, **more))
    assert asked == {"no_repeat_ngram_size": 3, "suppress_tokens": [4, 5], "num_beams": 4}
