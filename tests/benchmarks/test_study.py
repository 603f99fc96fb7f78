"""Answers replayed give the rounds of decoding them; the study runs on a tiny store, and goes on where it was."""

import json
import sys

import pytest
import torch
from benchmark_scripts import load_script
from block_reference import tiny_block
from saved_target import save_target, write_conversations
from tiny import tiny_draft, tiny_target

from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings

PROMPTS = [[5, 9, 17, 33, 2], [7, 7, 40, 41, 42, 43, 7, 7, 40], [90, 3, 8]]


@pytest.fixture(scope="module")
def replaying():
    return load_script("replay")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", [TreeShape(5, 3, 1), TreeShape(60, 3, 10)], ids=str)
@pytest.mark.parametrize("kind", ["eagle", "dspark", "lookup"])
def test_rounds_are_those_of_decoding(replaying, tmp_path, kind, shape, temperature):
    target = tiny_target("llama")
    drafter = {"eagle": lambda: tiny_draft(target), "dspark": lambda: tiny_block(target, "dspark"),
               "lookup": PromptLookup}[kind]()  # fmt: skip
    answers = replaying.recorded(
        target, PROMPTS, stops=(), most=24, temperature=temperature, kept=tmp_path / "answers.json"
    )
    rounds = replaying.replay(drafter, shape, answers, at_once=2)
    accepted = 0
    for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        law = Sampling(temperature, seed=index)
        made = generate(target, drafter, prompt, max_new_tokens=24, eos_token_ids=(), tree=shape, sampling=law)
        assert made.token_ids == answer.ids[len(prompt) :].tolist()
        places = [one.place - len(prompt) for one in rounds[index]]
        assert len(places) == made.num_forwards and places[0] == 1
        assert replaying.tau([rounds[index]]) == pytest.approx(made.tau)
        accepted += sum(one.accepted for one in rounds[index])
    if (shape.top_k > 1) if kind != "lookup" else temperature == 0:
        assert accepted  # there was something to count


def test_a_tiny_study_runs_and_goes_on(tmp_path, monkeypatch, replaying):
    study = load_script("study")
    save_target(tmp_path / "target", num_hidden_layers=8)
    write_conversations(tmp_path / "data.jsonl", 24, seed=1)
    extract(ExtractSettings(target=str(tmp_path / "target"), data=[str(tmp_path / "data.jsonl")],
                            output_dir=tmp_path / "states", tap_layers=(2, 3, 4, 5, 6)))  # fmt: skip
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["the quick brown fox"]}) + "\n")
    words = ["study", "--target", tmp_path / "target", "--states", tmp_path / "states", "--out", tmp_path / "out",
             "--drafters", "eagle3", "dspark", "--tokens", 300, "--passes", 1, "--seeds", 0, "--draft-vocab-size", 64,
             "--tasks", questions, "--max-new-tokens", 12, "--dtype", "float32"]  # fmt: skip

    def run(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *more)])
        study.main()
        return json.loads((tmp_path / "out" / "study.json").read_text())["results"]

    results = run()
    assert set(results) == {
        f"{name} T{temperature}" for temperature in (0, 1)
        for name in ("eagle3-300-1passes-0", "dspark-300-1passes-0", "lookup")
    }  # fmt: skip
    eagle = results["eagle3-300-1passes-0 T0"]
    assert set(eagle["tau"]) == {"questions", "all"} and len(eagle["by_position"]) == 7
    assert all(value >= 1 for value in eagle["tau"]["all"].values())
    config = json.loads((tmp_path / "out" / "eagle3-300-1passes-0" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # of the five that are stored

    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/model.safetensors")}
    run("--costs")
    again = run()
    assert again == results and made == {file: file.stat().st_mtime_ns for file in made}
    text = (tmp_path / "out" / "study.md").read_text()
    assert "## 300 tokens, 1 passes, T = 0" in text and "modelled: times plain on this CPU" in text

    timed = run("--seconds", "1")
    assert "eagle3-300-1s-0 T0" in timed


def test_a_store_that_is_not_there(monkeypatch, tmp_path, replaying):
    study = load_script("study")
    words = ["study", "--target", "t", "--states", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        study.main()


def test_shares(replaying):
    study = load_script("study")
    answer = replaying.Answer(torch.arange(12), 2, torch.zeros(12, 1, 1), torch.tensor([0.0] * 6 + [1.5] * 6))
    rounds = [replaying.Round(3, 2, 9), replaying.Round(6, 0, 6), replaying.Round(7, 1, 5)]
    assert study.by_position([(answer, rounds)], 3) == [2 / 3, 1 / 2, 0.0]
    assert study.by_position([(answer, rounds)], 5) == [1 / 2, 1.0, 0.0, None, None]  # the last has no room for five
    assert study.by_entropy([(answer, rounds)]) == [1.0, None, 1 / 2, None]
    assert replaying.tau([rounds]) == (3 + 1 + 2) / 3
