"""`fledge inspect HEAD` from the command line: figures, findings, exit status, the repaired copy."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_target import save_target, write_conversations
from tiny import tiny_draft

from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.drafters.eagle3.head import read_head
from fledge.target.model import Target


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"), max_position_embeddings=2048)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A tiny target's answers say as much after a few tokens."""
    monkeypatch.setattr("fledge.doctor.inspect_head.MEASURED_TOKENS", 12)


@pytest.fixture
def head_dir(target_dir, tmp_path):
    target = Target.from_pretrained(str(target_dir))
    save_draft(tiny_draft(target), tmp_path / "head", dtype=torch.float32)
    return tmp_path / "head"


def inspect(head, target, *flags) -> int:
    few = ["--measure-prompts", "3"]
    return run_command("inspect", [str(head), "--target", str(target), *few, *flags])


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_untrained_head_is_deaf_and_says_what_was_tried(head_dir, target_dir, tmp_path, capsys):
    assert inspect(head_dir, target_dir, "--json", str(tmp_path / "i.json")) == 1
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["measured"]["positions"] >= 20 and found["measured"]["tau_stated"] < 1.3
    topics = {reading["topic"] for reading in found["measured"]["readings"]}
    assert topics == {"taps", "rope", "norms"}
    assert any("under every reading" in finding["what"] for finding in found["findings"])
    assert "chains of 4" in capsys.readouterr().err


def test_no_measure_reads_files_only(head_dir, target_dir, capsys):
    assert inspect(head_dir, target_dir, "--no-measure") == 0
    assert "not measured (--no-measure)" in capsys.readouterr().err
    change_config(head_dir, eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    assert inspect(head_dir, target_dir, "--no-measure") == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "look like layer *outputs*" in printed and "--fix OUT" in printed


def test_fix_writes_a_copy_that_passes(head_dir, target_dir, tmp_path, capsys):
    """Three diseases the files prove: outputs for inputs, a tied flag, a d2t of zeros."""
    want = read_head(head_dir)
    change_config(head_dir, eagle_aux_hidden_state_layer_ids=[1, 3, 4], tie_word_embeddings=True,
                  max_position_embeddings=64)  # fmt: skip
    tensors = load_file(head_dir / WEIGHTS)
    save_file({**tensors, "d2t": tensors["d2t"] + 5000}, head_dir / WEIGHTS)
    before = (head_dir / "config.json").read_bytes()
    assert inspect(head_dir, target_dir, "--no-measure") == 1
    assert inspect(head_dir, target_dir, "--no-measure", "--fix", str(tmp_path / "fixed")) == 0
    printed = " ".join(capsys.readouterr().err.split())
    for said in ("tap_layers: (1, 3, 4) -> (2, 4, 5)", "tie_word_embeddings is true", "rebuilt from t2d",
                 "max_position_embeddings: 64 -> 2048"):  # fmt: skip
        assert said in printed, said
    assert (head_dir / "config.json").read_bytes() == before
    fixed = read_head(tmp_path / "fixed")
    assert fixed.config == want.config
    assert all(torch.equal(fixed.tensors[name], tensor) for name, tensor in want.tensors.items())
    assert len(json.loads((tmp_path / "fixed" / "repair.json").read_text())["changes"]) == 4
    assert inspect(tmp_path / "fixed", target_dir, "--no-measure") == 0
    assert inspect(head_dir, target_dir, "--no-measure", "--fix", str(head_dir)) == 1
    assert "Name another folder" in capsys.readouterr().err


def test_coverage_of_a_data_file(head_dir, target_dir, tmp_path, capsys):
    data = write_conversations(tmp_path / "data.jsonl", 20)
    assert inspect(head_dir, target_dir, "--no-measure", "--data", str(data)) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "supervised tokens of" in printed and "a ceiling on" in printed


def test_a_target_without_weights_is_not_measured(head_dir, target_dir, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (target_dir / name).is_file():
            (tmp_path / name).write_bytes((target_dir / name).read_bytes())
    assert inspect(head_dir, tmp_path) == 0
    assert "not measured, since the target cannot be loaded" in capsys.readouterr().err


def test_without_a_target(head_dir, capsys):
    assert run_command("inspect", [str(head_dir)]) == 0
    assert "give --target" in capsys.readouterr().err


def test_the_engines_that_would_draft_with_it(head_dir, tmp_path, capsys):
    for layout, reads, refuses in (("vllm", "vLLM", "SGLang"), ("sglang", "SGLang", "vLLM")):
        assert run_command("export", [str(head_dir), "--to", layout, "--output-dir", str(tmp_path / layout)]) == 0
        assert run_command("inspect", [str(tmp_path / layout)]) == 0
        printed = " ".join(capsys.readouterr().err.split())
        assert re.search(rf"{reads} [\d.]+: reads these files", printed)
        assert re.search(rf"{refuses} [\d.]+: `fledge export .* it would not draft: its tap ids", printed)


def test_the_window_that_sglang_does_not_read_is_told(head_dir, target_dir, tmp_path, capsys):
    change_config(head_dir, sliding_window=512, layer_types=["sliding_attention"])
    assert run_command("export", [str(head_dir), "--to", "sglang", "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    inspect(tmp_path / "out", target_dir, "--no-measure")
    printed = " ".join(capsys.readouterr().err.split())
    assert "reads these files; start it with --speculative-draft-window-size 511" in printed
