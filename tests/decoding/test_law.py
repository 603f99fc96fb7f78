"""The law that flags and generation_config make together."""

import json

import pytest

from fledge.data.sampling import ExtraSampling
from fledge.decoding.law import described, law_of
from fledge.decoding.records import Sampling
from fledge.errors import UserError

NO_FLAGS = ExtraSampling()


@pytest.fixture
def law(tmp_path):
    """Make a target's generation_config, and the law of it and some flags."""

    def make(config: dict, *, temperature: float = 1.0, flags: ExtraSampling = NO_FLAGS, from_config="apply"):
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        return law_of(
            str(tmp_path), temperature=temperature, top_p=0.9, flags=flags, seed=3, from_config=from_config
        )  # fmt: skip

    return make


ASKED = {"repetition_penalty": 1.1, "top_k": 20, "min_p": 0.05, "temperature": 0.6}


def test_the_config_decides_where_no_flag_is_given(law, capsys):
    """top_k and repetition_penalty of generation_config were ignored in silence."""
    assert law(ASKED) == Sampling(1.0, 0.9, 20, 3, min_p=0.05, repetition_penalty=1.1)
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "sampling: repetition_penalty 1.1, temperature 1, top_k 20, top_p 0.9, min_p 0.05; the target's "
        "generation_config asks for temperature 0.6: the flags decide"
    )


def test_flags_overrule_it(law):
    flags = ExtraSampling(repetition_penalty=1.0, top_k=0)
    assert law(ASKED, flags=flags) == Sampling(1.0, 0.9, 0, 3, min_p=0.05)
    assert law(ASKED, from_config="ignore") == Sampling(1.0, 0.9, 0, 3)


def test_greedy_is_greedy_with_the_penalty(law, capsys):
    assert law(ASKED, temperature=0.0).repetition_penalty == 1.1
    assert "sampling: greedy, repetition_penalty 1.1;" in " ".join(capsys.readouterr().err.split())
    assert described(Sampling(), {}) == "sampling: greedy"


def test_stop_strings_of_the_config_end_answers(law, capsys):
    """A target that asks for them was refused."""
    assert law({"stop_strings": "\n\n"}, temperature=0.0).stop == ("\n\n",)
    assert "sampling: greedy, stop '\\n\\n'" in " ".join(capsys.readouterr().err.split())
    flags = ExtraSampling(stop=("END", "x"))
    assert law({"stop_strings": ["a", "b"]}, flags=flags).stop == ("END", "x")
    assert "asks for stop 'a' 'b': the flags decide" in " ".join(capsys.readouterr().err.split())
    assert law({"stop_strings": ["a"]}, from_config="ignore").stop == ()


def test_what_cannot_be_applied_stops_the_run_by_its_name(law):
    with pytest.raises(UserError, match=r"sets no_repeat_ngram_size, num_beams, which fledge does not apply.*ignore"):
        law({"no_repeat_ngram_size": 2, "num_beams": 4, "top_k": 5})
    with pytest.raises(UserError, match="sets typical_p"):
        law({"typical_p": 0.9})
    assert law({"typical_p": 0.9}, temperature=0.0).temperature == 0, "changes nothing where nothing is drawn"
    assert law({"no_repeat_ngram_size": 2}, from_config="ignore") == Sampling(1.0, 0.9, 0, 3)


def test_a_target_without_the_file_asks_for_nothing(tmp_path):
    flags = {"temperature": 0.0, "top_p": 1.0, "flags": NO_FLAGS, "seed": None}
    assert law_of(str(tmp_path), from_config="apply", **flags) == Sampling()
