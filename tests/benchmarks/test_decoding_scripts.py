"""The scripts that measure decoding run on a tiny target, and what they compare is compared."""

import json
import re
import sys

import pytest
import torch
from benchmark_scripts import load_script
from saved_target import save_target
from tiny import tiny_draft

from fledge.drafters.head_files import save_draft
from fledge.target.model import Target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a head for it, and four questions of one set, one of them of two turns."""
    folder = tmp_path_factory.mktemp("decoding")
    save_target(folder / "target")
    target = Target.from_pretrained(str(folder / "target"), dtype=torch.float32, device="cpu", tap_layers=(1, 2, 3))
    save_draft(tiny_draft(target), folder / "head", dtype=torch.float32)
    (folder / "bench" / "mt_bench").mkdir(parents=True)
    asked = (["the fox"], ["a dog", "and then?"], ["water"], ["run"])
    rows = [{"question_id": number, "turns": turns} for number, turns in enumerate(asked)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "bench" / "mt_bench" / "question.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(name: str, *words: str) -> str:
        script = load_script(name)
        monkeypatch.setattr(sys, "argv", [name, *words])
        threads = torch.get_num_threads()
        try:
            script.main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def test_a_step_beside_the_stock_one(folder, run):
    """Its stand-ins had the wrong types when the things they stand for had changed, and the stock side was refused."""
    words = ("--dtype", "float32", "--threads", "1", "--turns", "2")
    rows = run("decode_step", str(folder / "target"), str(folder / "head"), *words).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["float32, stock", "float32, ours"]
    assert all(re.fullmatch(r"[\d./ |]+", row.split("|", 2)[2]) for row in rows)


def test_the_same_text(folder, run, tmp_path):
    log = tmp_path / "log.jsonl"
    words = (str(folder / "bench"), "--log", str(log), "--per-set", "4", "--new-tokens", "6", "--threads", "1")
    found = run("same_text", str(folder / "target"), str(folder / "head"), *words, "--dtype", "float32")
    ways = re.findall(r"^(T = .*?) +(\d of \d) ", found, re.MULTILINE)
    assert len({way for way, _ in ways}) == 10 and {count for _, count in ways} <= {"4 of 4", "5 of 5"}
    answered = [json.loads(line)["question"] for line in log.read_text().splitlines()]
    assert answered == [*(f"mt_bench {number}" for number in range(4)), "mt_bench 1, turn 2"]


def test_a_target_that_is_quantised(folder, run, tmp_path):
    words = ("--bench-dir", str(folder / "bench"), "--out", str(tmp_path), "--tasks", "mt_bench", "--questions", "4")
    words = (*words, "--max-new-tokens", "6", "--formats", "none", "fp8", "--dtype", "float32")
    run("quantised_target", "--target", str(folder / "target"), "--draft", str(folder / "head"), *words)
    formats = json.loads((tmp_path / "quantised.json").read_text())["formats"]
    assert formats["none"]["changed"] == 0 and formats["none"]["same"] == 1
    assert 0.001 < formats["fp8"]["changed"] < 0.1


def test_plain_decoding_beside_generate(folder, run):
    words = ("--dtype", "float32", "--repeats", "1", "--threads", "1", "--new-tokens", "6")
    assert json.loads(run("decode_cpu", str(folder / "target"), *words))["float32"]


def test_several_prompts_at_once(folder, run):
    words = ("--batches", "1", "2", "--threads", "1", "--repeats", "1", "--new-tokens", "6")
    figures = json.loads(run("decode_batches", str(folder / "target"), str(folder / "head"), *words))
    assert len(figures) == 4 and all(row["same_tokens"] for row in figures.values())
