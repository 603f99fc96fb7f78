"""`fledge quickstart --target ANY`: a local model without a hub, its closing words, and a folder per target."""

import json
from pathlib import Path

import pytest
from saved_target import byte_tokenizer, save_target

from fledge.commands.quickstart import QuickstartArgs, closing_lines, default_output_dir, quickstart
from fledge.errors import UserError

SHORT = {"max_samples": 3, "max_new_tokens": 6, "num_train_epochs": 1, "question_end": 1, "draft_vocab_size": 64}


def test_any_local_target(tmp_path, monkeypatch, capsys):
    """A hybrid of 4 layers with sliding windows and no chat template of its own: all that differs from SmolLM2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    target = save_target(
        tmp_path / "tiny", "gemma3", vocab_size=len(byte_tokenizer()), num_hidden_layers=4, max_position_embeddings=1024
    )
    (target / "chat_template.jinja").unlink()
    args = QuickstartArgs(target=str(target), chat_template_type="chatml", tap_layers=(1, 2, 3), **SHORT)
    quickstart(args)
    printed = capsys.readouterr().err
    work = tmp_path / "outputs" / "quickstart-tiny"
    assert json.loads((work / "head" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert (work / "bench" / "report.html").is_file()
    assert "tau: " in printed and "one question: no interval" in printed and "outputs: identical" in printed
    quickstart(args)  # again: nothing is made anew
    again = capsys.readouterr().err
    assert "3 rows are there already" in again and "tau: " in again


def test_only_prepared(tmp_path, capsys):
    quickstart(QuickstartArgs(target="any/model", output_dir=tmp_path, prepare_only=True, max_samples=5))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".fledge")] == ["prompts.jsonl"]
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 5
    assert "target:  any/model" in (printed := capsys.readouterr().err) and "prompts.jsonl" in printed


def test_a_step_that_fails_stops_it_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`fledge regenerate` ended with status 1"):
        quickstart(QuickstartArgs(target=str(tmp_path / "nowhere"), **SHORT))


def test_targets_do_not_share_a_folder():
    assert default_output_dir(None) == Path("outputs/quickstart")
    assert default_output_dir("Qwen/Qwen3-0.6B") == Path("outputs/quickstart-Qwen3-0.6B")
    assert default_output_dir("/models/a/") == Path("outputs/quickstart-a")


def summary(speedup: dict | None, identical: int, tau: float | None = 1.5) -> dict:
    quality = {"compared": 4, "identical": identical}
    return {"sets": {"quick": {"acceptance": {"tau": tau}, "speedup": speedup, "quality": quality}}}


def test_closing_words():
    tau, speed, outputs = closing_lines(summary({"value": 1.2, "low": 1.1, "high": 1.3}, 4))
    assert tau.endswith("1.50 tokens per target forward") and outputs == "outputs: identical"
    assert speed.endswith("1.20 x plain decoding (95 % interval 1.10 to 1.30)")
    tau, speed, outputs = closing_lines(summary(None, 3, None))
    assert "too short" in tau and "too short" in speed and outputs == "outputs: 1 differ, see the report"
