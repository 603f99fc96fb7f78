"""The script that publishes the reference head, end to end on a tiny target; and what is published, if it is here."""

import contextlib
import importlib
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes.streaming_server import StreamingServer, starting
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_target import byte_tokenizer, save_target, write_conversations

from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import load_draft

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = sorted(path.parent for path in (ROOT / "heads").glob("*/*/config.json"))
SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("reference_head")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny target, a head of two steps from stored states, two questions of each set, a note on the data."""
    folder = tmp_path_factory.mktemp("reference")
    save_target(folder / "target", vocab_size=len(byte_tokenizer()), max_position_embeddings=1024)
    write_conversations(folder / "data.jsonl", 12)
    words = [
        "--target_model_name_or_path", folder / "target", "--train_data_path", folder / "data.jsonl",
        "--train_hidden_path", folder / "states", "--output_dir", folder / "trained", "--max_steps", 2,
        "--ttt_steps", 2, "--draft_vocab_size", 64, "--save_strategy", "no",
    ]  # fmt: skip
    assert run_command("train", [str(word) for word in words]) == 0
    for name in SETS:
        (folder / "bench" / name).mkdir(parents=True)
        rows = [{"question_id": n, "category": "x", "turns": [f"{name} {n}: the quick brown fox"]} for n in range(3)]
        (folder / "bench" / name / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.md").write_text("Random words (public domain).\n")
    return folder


@pytest.fixture
def publish(script, made, tmp_path, monkeypatch):
    """Run the script; returns the published folder."""

    def go(*more: object, trained: Path = made / "trained") -> Path:
        words = [
            "reference_head.py", trained, "--target", made / "target", "--name", "org/Tiny", "--data-note",
            made / "data.md", "--out", tmp_path / "tiny-head", "--work", tmp_path / "work", "--bench-dir",
            made / "bench", "--questions", 2, "--max-new-tokens", 12, "--tree", "5/1/2", *more,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        script.main()
        return tmp_path / "tiny-head"

    return go


@pytest.fixture
def ran(script, monkeypatch) -> list[list[str]]:
    """Every fledge command the script ran."""
    commands = []
    real = script.run_command
    monkeypatch.setattr(
        script, "run_command", lambda name, words: (commands.append([name, *words]), real(name, words))[1]
    )
    return commands


@pytest.mark.slow
def test_from_a_trained_head_to_a_published_one(publish, script, made, ran, monkeypatch):
    stream = StreamingServer(has_head=False, gap_s=0.001), StreamingServer(has_head=True, gap_s=0.001)
    port = free_pair()

    @contextlib.contextmanager
    def servers(args):
        with starting() as start:
            for index, server in enumerate(stream):
                start(server, port + index)
            yield "0.0.fake"

    monkeypatch.setattr(script, "servers", servers)
    vllm = ("--vllm", sys.executable, "--base-port", port)
    out = publish(*vllm)
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        "README.md", "config.json", "export.json", "model.safetensors", "results.json", "results.md",
    ]  # fmt: skip
    document = json.loads((out / "results.json").read_text())
    assert [cell["name"] for cell in document["cells"]] == [
        "T0-tuned", "T0-5-1-2", "T0-vllm-3", "T1-tuned", "T1-5-1-2",
    ]  # fmt: skip
    for cell in document["cells"]:
        asked = [cell["sets"][name] for name in SETS]
        assert all(figures["questions"] == 2 and figures["tau"] >= 1 for figures in asked)
        assert "--question-end 2" in cell["command"] and str(made) not in cell["command"]
        if cell["temperature"] == 0:
            assert all(figures["quality"]["identical"] == 2 for figures in asked)
    assert document["cells"][2]["vllm"] == "0.0.fake" and document["cells"][2]["sets"]["gsm8k"]["tau"] == 2.0
    assert document["training"]["records"] == 12 and document["training"]["supervised"] > 100

    card = (out / "README.md").read_text()
    said = (
        "license: apache-2.0", "base_model: org/Tiny", "vllm serve org/Tiny", "sglang.launch_server",
        "Random words (public domain)", "12 conversations", "| 0 | fledge, tree 5/1/2 |",
        "| 0 | vLLM 0.0.fake, chain of 3 |", "measured at T = 0 only", '"model": "tiny-head"',
        "8 of 8", "fledge decode --target org/Tiny --draft tiny-head",
    )  # fmt: skip
    for words in said:
        assert words in card, words
    assert "| 0 | fledge, tree" in (out / "results.md").read_text()

    asked, size = [len(server.bodies) for server in stream], (out / "model.safetensors").read_bytes()
    del ran[:]
    publish(*vllm)  # again: nothing is measured anew, the card is written again
    assert [words[0] for words in ran] == ["export", "export"] and [len(server.bodies) for server in stream] == asked
    (out.parent / "work" / "cells" / "T1-tuned" / "cell.json").unlink()
    del ran[:]
    publish(*vllm)  # one cell lost its mark: it alone is run
    assert [words[-1] for words in ran if words[0] == "bench"] == ["cells/T1-tuned"]
    assert (out / "model.safetensors").read_bytes() == size


def test_what_a_head_saw_counts_the_runs_before_it(script, tmp_path):
    """Two stores, three runs, the third over the first store again: each store once in the sums, each run a stage."""

    def run(name: str, store: str, supervised: int, **config: str) -> Path:
        (tmp_path / store).mkdir(exist_ok=True)
        counts = {"records": 2, "tokens": 2 * supervised, "supervised": supervised}
        (tmp_path / store / "manifest.json").write_text(json.dumps({"counts": counts}))
        (tmp_path / name).mkdir()
        document = {
            "config": {"train_hidden_path": [str(tmp_path / store)], **config},
            "metrics": {"epoch": 1.0, "eval_tau": 1.5}, "steps": 7,
        }  # fmt: skip
        (tmp_path / name / "provenance.json").write_text(json.dumps(document))
        return tmp_path / name

    one = run("one", "a", 10)
    two = run("two", "b", 30, init_from=str(one))
    three = run("three", "a", 10, init_from=str(two))
    assert script.training(one)["supervised"] == 10
    facts = script.training(three)
    assert (facts["records"], facts["tokens"], facts["supervised"]) == (4, 80, 40)
    assert [stage["supervised"] for stage in facts["stages"]] == [10, 30, 10]
    results = importlib.import_module("reference_head_results")
    assert results.stages_text(script.training(one)["stages"]) == "1 pass"
    assert results.stages_text(facts["stages"][:2]).endswith(": 1 pass over 2, then 1 pass over 2")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "results.json").write_text(json.dumps({"training": facts}))
    four = run("four", "c", 100, init_from=str(tmp_path / "published"))
    more = script.training(four)
    assert (more["records"], more["supervised"]) == (6, 140)
    assert [stage["supervised"] for stage in more["stages"]] == [10, 30, 10, 100]
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(script.UserError, match="is not there any more"):
        script.training(three)
    online = json.loads((one / "provenance.json").read_text())
    online["config"]["train_hidden_path"] = []
    (one / "provenance.json").write_text(json.dumps(online))
    with pytest.raises(script.UserError, match="trained online"):
        script.training(one)


def free_pair() -> int:
    """A port that is free together with the one behind it."""
    for port in range(21000, 22000, 2):
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two free ports")


@pytest.mark.slow
def test_answers_that_differ_are_not_published(publish, monkeypatch):
    """Negative control: an acceptance that keeps what the target would not have written."""
    from fledge.decoding import round

    honest = round.accept

    def wrong(trees, *args, **options):
        accepted = honest(trees, *args, **options)
        return accepted if trees.num_nodes == 1 else replace(accepted, token_ids=(accepted.token_ids + 1) % 256)

    monkeypatch.setattr(round, "accept", wrong)
    with pytest.raises(SystemExit, match="`fledge bench` ended with status 1"):
        publish("--temperatures", 0)


@pytest.mark.parametrize(
    "missing", ["bench/gsm8k/question.jsonl", "data.md", "trained/provenance.json", "states/manifest.json"]
)
def test_what_is_missing_is_named_before_anything_runs(publish, made, ran, missing):
    path = made / missing
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(SystemExit, match=missing.split("/")[0]):
            publish()
    finally:
        path.write_bytes(kept)
    assert ran == []


def test_weights_of_another_kind_are_refused(script, made, tmp_path):
    weights = load_file(made / "trained" / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in weights.items()}, tmp_path / "float.safetensors")
    with pytest.raises(script.UserError, match="float32.*published are bf16"):
        script.check_weights(tmp_path / "float.safetensors")
    save_file({"large": torch.zeros(13_000_000, dtype=torch.bfloat16)}, tmp_path / "large.safetensors")
    with pytest.raises(script.UserError, match="26.0 MB"):
        script.check_weights(tmp_path / "large.safetensors")


@pytest.mark.parametrize("head", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_published_heads(head, script):
    """What the repository carries: it loads, it is small, its card and results belong to these weights."""
    sha = script.check_weights(head / "model.safetensors")
    document = json.loads((head / "results.json").read_text(encoding="utf-8"))
    assert document["weights_sha256"] == sha and len(document["cells"]) >= 4
    card = (head / "README.md").read_text(encoding="utf-8")
    assert "## Training data" in card and "license: apache-2.0" in card and "evaluation only" in card
    with safe_open(head / "model.safetensors", "pt") as weights:
        hidden = weights.get_slice("midlayer.hidden_norm.weight").get_shape()[0]
    load_draft(head, torch.zeros(document_vocabulary(head), hidden))


def document_vocabulary(head: Path) -> int:
    return json.loads((head / "config.json").read_text(encoding="utf-8"))["vocab_size"]
