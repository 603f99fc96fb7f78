"""Bad input at the command line: one line that names the file, line or key and the remedy, status 1, no traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_target import write_conversations
from tiny import tiny_draft, tiny_target

from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.target.model import Target


@pytest.fixture
def place(tmp_path, tiny_model_dir, monkeypatch):
    """A target, data and a head that belong together; each test breaks one of them."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model_dir, tmp_path / "target")
    write_conversations(tmp_path / "data.jsonl", 8)
    save_draft(tiny_draft(Target.from_pretrained(str(tmp_path / "target"))), tmp_path / "head", dtype=torch.float32)
    return tmp_path


def rows(place, *values) -> None:
    (place / "data.jsonl").write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))


def turns(*roles: str) -> dict:
    return {"id": "x", "conversations": [{"from": role, "value": "some words"} for role in roles]}


def train(place) -> list[str]:
    return ["--target_model_name_or_path", str(place / "target"), "--train_data_path", str(place / "data.jsonl"),
            "--output_dir", str(place / "out")]  # fmt: skip


def decode(place) -> list[str]:
    return ["--target", str(place / "target"), "--draft", str(place / "head"), "--prompt", "hello",
            "--max-new-tokens", "4"]  # fmt: skip


def edit_template(place, text: str) -> None:
    (place / "target" / "chat_template.jinja").write_text(text)


def edit_head(place, change) -> None:
    tensors = load_file(place / "head" / WEIGHTS)
    change(tensors)
    save_file(tensors, place / "head" / WEIGHTS)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


# what is broken -> (command, how, what the line must say)
CASES = {
    "missing data": ("train", lambda p: (p / "data.jsonl").unlink(), r"data\.jsonl: no such"),
    "broken JSON line": ("train", lambda p: rows(p, turns("human", "gpt"), '{"id": \n'), r"data\.jsonl:2"),
    "empty conversation": ("train", lambda p: rows(p, {"id": "x", "conversations": []}), r"data\.jsonl:1.*empty"),
    "roles out of order": ("train", lambda p: rows(p, turns("gpt", "gpt", "human")), r"data\.jsonl:1.*(role|order)"),
    "unknown format": (
        "train", lambda p: rows(p, {"id": "x", "text": "abc"}), r"data\.jsonl:1.*(format|conversations)"),
    "template that cannot be masked": (
        "train", lambda p: edit_template(p, "{% for m in messages|reverse %}{{ m.content }}|{% endfor %}"), "template"),
    "no such target": ("train", lambda p: shutil.rmtree(p / "target"), "target.*(no such|could not|no config)"),
    "truncated target": ("train", lambda p: cut(p / "target" / "model.safetensors"), "target.*could not be loaded"),
    "head of another vocabulary": (
        "decode", lambda p: save_draft(tiny_draft(tiny_target("llama")), p / "head"), "vocabulary|vocab"),
    "truncated head": ("decode", lambda p: cut(p / "head" / WEIGHTS), "not a complete safetensors file"),
    "NaN head": ("decode", lambda p: edit_head(p, lambda t: t["fc.weight"].fill_(float("nan"))), "fc.weight.*NaN"),
    "missing tensor": ("decode", lambda p: edit_head(p, lambda t: t.pop("norm.weight")), "missing: norm.weight"),
    "no head": ("decode", lambda p: shutil.rmtree(p / "head"), "head.*no such (file|folder)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_status_1(case, place, capsys):
    command, spoil, message = CASES[case]
    spoil(place)
    status = run_command(command, train(place) if command == "train" else decode(place))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(errors) == 1
    import re

    assert re.search(message, errors[0], re.I), errors[0]
    assert "Traceback" not in errors[0] and len(errors[0]) > 40


def test_sound_input_passes(place):
    """Negative control: unbroken, both commands succeed."""
    assert run_command("train", [*train(place), "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert run_command("decode", decode(place)) == 0
