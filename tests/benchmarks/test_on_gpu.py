"""The GPU's benchmark, rehearsed on a CPU with tiny shapes: every section runs, short runs add up to one record."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from saved_target import save_target
from tiny import tiny_draft

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.target.model import Target

OWN = {"on_gpu", "gpu_bench", "gpu_decoding", "gpu_training", "gpu_commands", "decode_shapes", "train_step_worker"}
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import on_gpu

    yield on_gpu
    for name in set(sys.modules) - before:
        if name in OWN:
            sys.modules.pop(name)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "on_gpu.jsonl").read_text().splitlines()]


def record(folder: Path) -> dict:
    return json.loads((folder / "on_gpu.json").read_text())


HEAVY = {"ray_workers"}  # starts processes: a test of its own in tests/bench/test_workers.py


def test_every_section_runs(on_gpu, tmp_path):
    names = [name for name in on_gpu.SECTIONS if name not in HEAVY]
    status = on_gpu.main(["--device", "cpu", "--small", "--seconds", "10000", "--out", str(tmp_path), "--only", *names])
    found = {line["section"]: line for line in lines(tmp_path)}
    assert list(found) == names and status == 0, [line.get("error") for line in found.values()]
    left_out = {name for name, line in found.items() if "left_out" in line}
    assert left_out == {"head", "waits"}, "without a real head, and what only a GPU counts"
    speed = found["plain"]["result"]["speed"]
    assert speed["value"] > 0 and speed["unit"] == "tok/s" and speed["goal"] == 170 and "H100" in speed["peer"]
    assert found["train_equal"]["result"]["largest_difference"] == 0.0, "the CPU beside itself"
    assert all(line["card"] and line["commit"] and line["versions"]["torch"] for line in found.values())
    assert record(tmp_path)["missing"] == sorted(HEAVY)


def test_a_real_head_is_measured(on_gpu, tmp_path):
    target = save_target(tmp_path / "target")
    save_draft(tiny_draft(Target.from_pretrained(str(target), device="cpu")), tmp_path / "head")
    words = ["--device", "cpu", "--small", "--seconds", "10000", "--out", str(tmp_path), "--only", "head"]
    assert on_gpu.main([*words, "--target", str(target), "--draft", str(tmp_path / "head")]) == 0
    found = lines(tmp_path)[0]["result"]
    assert list(found) == ["temperature 0", "temperature 1", "temperature 0, tree 60/5/10", "temperature 0, exact"]


def test_short_runs_add_up(on_gpu, tmp_path):
    options = ["--device", "cpu", "--small", "--out", str(tmp_path), "--only"]
    assert on_gpu.main([*options, "device"]) == 0
    first = record(tmp_path)
    assert list(first["sections"]) == ["device"] and "attention" in first["missing"]
    with (tmp_path / "on_gpu.jsonl").open("a") as file:
        file.write('{"section": "attention", "resu')  # a run that was cut off
        file.write("\n")
    assert on_gpu.main([*options, "attention"]) == 0
    both = record(tmp_path)
    assert list(both["sections"]) == ["device", "attention"] and len(both["runs"]) == 2
    assert both["sections"]["device"] == first["sections"]["device"]
    assert both["runs"][1]["command"].endswith("--only attention")


def test_a_good_result_outlives_a_failure(on_gpu):
    good, bad = {"section": "plain", "result": {"x": 1}, "card": "a"}, {"section": "plain", "error": "e", "card": "b"}
    for order in ([good, bad], [bad, good]):
        found = on_gpu.merged(order)
        assert found["sections"]["plain"]["result"] == {"x": 1} and found["runs"][0]["card"] == "a"
    assert "error" in on_gpu.merged([bad])["sections"]["plain"]
    newer = {**good, "result": {"x": 2}}
    assert on_gpu.merged([good, newer])["sections"]["plain"]["result"] == {"x": 2}


def test_a_section_that_fails_or_hangs_does_not_stop_the_others(on_gpu, tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise RuntimeError("no kernel image")

    section = on_gpu.Section
    monkeypatch.setattr(on_gpu, "SECTIONS", {
        "fails": section(1, "", fails), "hangs": section(1, "", lambda bench: time.sleep(60)),
        "large": section(10_000, "", lambda bench: {}), "good": section(1, "", lambda bench: {"x": 1}),
    })  # fmt: skip
    monkeypatch.setattr(on_gpu, "OVER", 0.2)
    assert on_gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    fails_, hangs, large, good = lines(tmp_path)
    assert "no kernel image" in fails_["error"] and "in fails" in fails_["trace"]
    assert "stopped after 0 s" in hangs["error"] and hangs["seconds"] < 30
    assert "its budget is 10000 s" in large["left_out"] and good["result"] == {"x": 1}
    assert "failed: fails, hangs" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(on_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path)])
    assert "no CUDA device" in capsys.readouterr().err
    assert on_gpu.main(["--list"]) == 0 and "Plain decoding" in capsys.readouterr().out
