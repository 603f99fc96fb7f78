"""fledge bench and fledge decode with pictures in the prompt: lossless, logged, refused where they cannot be."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny_draft
from tiny_vlm import TAPS, picture_file, save_vlm

from fledge.bench.engine import EngineSpec
from fledge.bench.run import bench
from fledge.bench.settings import BenchSettings
from fledge.cli import main
from fledge.commands.parser import parse
from fledge.decoding import tune
from fledge.decoding.generate import generate
from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target


@pytest.fixture(scope="module", params=("qwen3_vl", "gemma3"))
def folders(request, tmp_path_factory) -> Path:
    """A tiny target, an untrained head for it, and questions about pictures and without."""
    folder = tmp_path_factory.mktemp(request.param)
    save_vlm(folder / "target", request.param)
    target = Target.from_pretrained(str(folder / "target"), tap_layers=TAPS)
    save_draft(tiny_draft(target), folder / "head", dtype=torch.float32)
    parts = [[{"type": "image", "image": picture_file(folder, seed).name}, {"type": "text", "text": "what?"}]
             for seed in range(3)]  # fmt: skip
    rows = [{"question_id": n, "turns": turns} for n, turns in enumerate(
        ([parts[0], "and now?"], [[*parts[1], *parts[2]]], ["no picture here"]))]  # fmt: skip
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(folders: Path, *more: str) -> BenchSettings:
    words = ["--base-model-path", str(folders / "target"), "--eagle-model-path", str(folders / "head"), "--bench-name",
             str(folders / "asked.jsonl"), "--num-gpus-total", "0", "--max-new-token", "12", *more]  # fmt: skip
    return parse(BenchSettings, words, prog="bench", description="")


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_both_sides_see_the_pictures(folders, tmp_path, temperature):
    bench(flags(folders, "--temperature", temperature, "--output-dir", str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "turns" in row]
    assert [row["question"][:12] for row in rows] == ["[image]what?", "[image]what?", "no picture h"]
    for turn in (turn for row in rows for turn in row["turns"]):
        if temperature == "0":
            assert turn["check"] == {"identical": True}
        else:
            assert -20 < turn["check"]["eagle_log_likelihood"] < 0


def test_a_wrong_picture_would_be_seen(folders):
    """The negative control: the engine's answers, likelihoods and near-ties hang on the pixels."""
    engine = EngineSpec.of(flags(folders, "--temperature", "0"), TreeShape(), num_gpus=0).load()
    asked = [engine.prompt([{"role": "user", "content": [
        {"type": "image", "image": str(picture_file(folders, seed))}, {"type": "text", "text": "what?"}]}])
        for seed in (0, 1)]  # fmt: skip
    assert asked[0].ids == asked[1].ids
    scores = [engine.mean_log_likelihood(prompt, [70, 71, 72]) for prompt in asked]
    assert abs(scores[0] - scores[1]) > 1e-3
    top = engine.top2(asked[0], [70, 71])
    ids = torch.tensor([[*asked[0].ids, 70, 71]])
    inputs = asked[0].followed_by([70, 71]).model_inputs
    expected = engine.target.model(input_ids=ids, use_cache=False, **inputs).logits[0, -1].topk(2).values
    assert top["gap"] == pytest.approx(float(expected[0] - expected[1]), abs=1e-4) and top["noise"] < 1e-3


def test_tuning_follows_answers_about_pictures(folders, monkeypatch):
    """The features the tuner drafts from are those of decoding: pixels and positions included."""
    monkeypatch.setattr(tune, "POSITIONS_PER_ANSWER", 2)
    engine = EngineSpec.of(flags(folders), TreeShape(), num_gpus=0).load()
    prompt = engine.prompt([{"role": "user", "content": [
        {"type": "image", "image": str(picture_file(folders, 0))}, {"type": "text", "text": "what?"}]}])  # fmt: skip
    with torch.inference_mode():
        answer = generate(
            engine.target, None, prompt.ids, model_inputs=prompt.model_inputs, max_new_tokens=14, eos_token_ids=()
        ).token_ids  # fmt: skip
        ranks = list(tune.ranks_along(engine.target, engine.draft, [(prompt, answer)], 3))
    assert len(ranks) == 2


def test_decode_shows_pictures(folders, capfd):
    words = (
        f"decode --target {folders / 'target'} --draft {folders / 'head'} --prompt what? --max-new-tokens 8 --compare"
    )
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(words), "--image", str(picture_file(folders, 0)), str(picture_file(folders, 1))])
    assert not ended.value.code and "outputs identical" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(words), "--image", "nowhere.png"])
    assert ended.value.code == 1 and "nowhere.png: no such file" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(words), "--raw", "--image", "x.png"])
    assert ended.value.code == 1 and "--image has no place in it" in capfd.readouterr().err


def test_a_missing_picture_stops_a_benchmark_by_name(folders, tmp_path):
    rows = [{"question_id": 7, "turns": [[{"type": "image", "image": "gone.png"}, {"type": "text", "text": "what?"}]]}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="gone.png: no such file"):
        bench(flags(folders, "--bench-name", str(tmp_path / "asked.jsonl"), "--output-dir", str(tmp_path / "out")))
