"""`fledge quickstart`: any local model without a hub, a published head shown first, the closing table, one folder per
target."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from saved_target import byte_tokenizer, save_target
from tiny import tiny_draft

import fledge
from fledge.commands import quickstart as module
from fledge.commands import side_by_side
from fledge.commands.quickstart import QuickstartArgs, default_output_dir, quickstart, rows, speedup_cell
from fledge.drafters.head_files import save_draft
from fledge.errors import UserError
from fledge.target.model import Target

SHORT = {"max_samples": 3, "max_new_tokens": 6, "num_train_epochs": 1, "question_end": 1, "draft_vocab_size": 64}


def test_any_local_target(tmp_path, monkeypatch, capsys):
    """A hybrid of 4 layers with sliding windows and no chat template of its own: all that differs from SmolLM2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    target = save_target(
        tmp_path / "tiny", "gemma3", vocab_size=len(byte_tokenizer()), num_hidden_layers=4, max_position_embeddings=1024
    )
    (target / "chat_template.jinja").unlink()
    args = QuickstartArgs(target=str(target), tap_layers=(1, 2, 3), **SHORT)
    quickstart(args)
    printed = capsys.readouterr().err
    assert f"{target} has no chat template; its prompts are written as chatml" in printed
    work = tmp_path / "outputs" / "quickstart-tiny"
    assert json.loads((work / "head" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert (work / "bench" / "report.html").is_file()
    assert "published head" not in printed  # of another target
    assert "your head" in printed and "1 of 1" in printed
    quickstart(args)  # again: nothing is made anew
    again = capsys.readouterr().err
    assert "3 rows are there already" in again and "your head" in again


def test_only_prepared(tmp_path, capsys):
    quickstart(QuickstartArgs(target="any/model", output_dir=tmp_path, prepare_only=True, max_samples=5))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".fledge")] == ["prompts.jsonl"]
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 5
    assert f"export TARGET=any/model PROMPTS={tmp_path / 'prompts.jsonl'}" in capsys.readouterr().err


def test_a_step_that_fails_stops_it_with_its_name(monkeypatch):
    monkeypatch.setattr("fledge.cli.run_command", lambda name, words: 1)
    with pytest.raises(UserError, match="`fledge regenerate` ended with status 1"):
        module.run("regenerate")


def test_what_is_not_there_is_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target, data = str(tmp_path / "nowhere"), str(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        quickstart(QuickstartArgs(target=target, **SHORT))
    monkeypatch.setattr(module, "smollm2_files", lambda folder: "target")
    with pytest.raises(UserError, match="nothing.jsonl"):
        quickstart(QuickstartArgs(data=data, **SHORT))
    assert "$ fledge" not in capsys.readouterr().err  # before any step


def test_targets_do_not_share_a_folder():
    assert default_output_dir(None) == Path("outputs/quickstart")
    assert default_output_dir("Qwen/Qwen3-0.6B") == Path("outputs/quickstart-Qwen3-0.6B")
    assert default_output_dir("/models/a/") == Path("outputs/quickstart-a")


def test_a_published_head_is_shown_first(tmp_path, monkeypatch, capsys):
    """Plain and drafted side by side, then its benchmark; its row stands in the closing table."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    target = save_target(tmp_path / "tiny", vocab_size=len(byte_tokenizer()), num_hidden_layers=8)
    save_draft(tiny_draft(Target.from_pretrained(str(target), tap_layers=None)), tmp_path / "published")
    monkeypatch.setattr(module, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(module, "smollm2_files", lambda folder: str(target))
    quickstart(QuickstartArgs(output_dir=tmp_path / "work", **SHORT))
    printed = capsys.readouterr().err
    assert printed.index("the same text, ") < printed.index("Your own, 1 of 3")
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines[-3:]] == ["no head, lookup", "your head", "published head"]
    assert all("1 of 1" in line for line in lines[-3:])


def test_both_sides_grow_on_a_terminal(tmp_path, monkeypatch):
    """Two panels with the same text; the side with less time behind it goes on."""
    target = save_target(tmp_path / "tiny", vocab_size=len(byte_tokenizer()), num_hidden_layers=8)
    pair = fledge.load(target, "lookup")
    written = io.StringIO()
    monkeypatch.setattr(side_by_side, "console", Console(file=written, force_terminal=True, width=80))
    plain, drafted = side_by_side.side_by_side(pair, list(b"abcabcabc"), (), 12)
    assert plain.token_ids == drafted.token_ids and len(plain.token_ids) == 12
    assert plain.text().plain == drafted.text().plain
    shown = written.getvalue()
    assert "plain decoding" in shown and "with the draft head" in shown and "12 tokens" in shown
    assert plain.tokens_per_s > 0 < drafted.tokens_per_s


def test_an_interrupted_step_interrupts_it(monkeypatch):
    monkeypatch.setattr("fledge.cli.run_command", lambda name, words: 130)
    with pytest.raises(KeyboardInterrupt):
        module.run("regenerate")


def found(speedup: dict | None, identical: int, tau: float | None = 1.5) -> dict:
    return {
        "acceptance": {"tau": tau}, "speedup": speedup, "quality": {"compared": 4, "identical": identical},
        "baseline": {"tokens_per_s": 20.0}, "eagle": {"tokens_per_s": 24.0},
    }  # fmt: skip


def test_closing_table():
    """Every head beside the plain runs of its own benchmark: a machine is not equally fast twice."""
    busy = found(None, 3, None) | {"baseline": {"tokens_per_s": 15.0}}
    own, published = rows({"your head": found({"value": 1.2, "low": 1.1, "high": 1.3}, 4), "published head": busy})
    assert own == ("your head", "20.0", "24.0", "1.20 x (1.10 to 1.30)", "1.50", "4 of 4")
    assert published == ("published head", "15.0", "24.0", "too short", "too short", "3 of 4")
    assert speedup_cell({"value": 1.2, "low": None, "high": None}) == "1.20 x"
