"""The command line's edge: which errors are one line, with which status, and which keep their traceback."""

import dataclasses
import io
import re
import sys
import types

import jinja2
import pytest
from safetensors import SafetensorError

from fledge import cli
from fledge.cli import Command, one_line, run_command
from fledge.commands.parser import refuse_empty
from fledge.commands.train import TrainArgs, parse_args
from fledge.errors import UserError


@pytest.fixture
def command(monkeypatch):
    """Runs a function as a command whose flags are `--number N`."""

    @dataclasses.dataclass
    class Args:
        number: int = 1

    def run(function) -> int:
        module = types.ModuleType("a_command")
        module.__dict__.update(Args=Args, run=function)
        monkeypatch.setitem(sys.modules, "a_command", module)
        monkeypatch.setitem(cli.COMMANDS, "a", Command("a_command", "Args", "run", "a command"))
        monkeypatch.delenv("FLEDGE_TRACEBACK", raising=False)
        return run_command("a", [])

    return run


def raising(error: Exception):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "error", [UserError("a\nb"), OSError(28, "No space left"), SafetensorError("header"), jinja2.TemplateError("x")]
)
def test_what_a_user_can_mend_is_one_line(error, command, capfd):
    assert command(raising(error)) == 1
    assert capfd.readouterr().err.strip() == f"error: {one_line(error)}"
    assert "\n" not in one_line(error)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), ValueError("ours"), AssertionError("ours")])
def test_our_own_faults_keep_their_traceback(error, command):
    """Negative control: the net does not hide a bug."""
    with pytest.raises(type(error)):
        command(raising(error))


def test_a_command_that_works_exits_with_0(command):
    assert command(lambda args: None) == 0


@pytest.mark.parametrize("words", [["train", "--no_such_flag"], ["train"], ["plan", "--config", "/no/recipe.yaml"]])
def test_wrong_flags_exit_with_2(words, capfd):
    assert run_command(words[0], words[1:]) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_flags_that_the_parser_refuses_exit_with_2(capfd):
    with pytest.raises(SystemExit) as end:
        run_command("plan", ["--target", "T", "--num-gpus", "many"])
    assert end.value.code == 2


@pytest.mark.parametrize(("words", "needed"), [
    (["bench"], "--target is needed: the target: "), (["inspect"], "PATH is needed: data "),
    (["export", "head"], "--output-dir is needed: where "),
])  # fmt: skip
def test_what_must_be_given_is_one_line(words, needed, capfd):
    """It was a box of twelve lines."""
    assert run_command(words[0], words[1:]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {needed}") and said.count("\n") == 1


def test_ctrl_c_says_what_is_kept(command, capfd, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    assert command(interrupted) == 130 and capfd.readouterr().err == "interrupted\n"
    monkeypatch.setitem(cli.COMMANDS, "a", dataclasses.replace(cli.COMMANDS["a"], kept="all of it"))
    assert run_command("a", []) == 130 and capfd.readouterr().err == "interrupted: all of it\n"
    kept = {name for name, one in cli.COMMANDS.items() if one.kept}
    assert kept == {"a", "regenerate", "extract", "quickstart"}  # train and bench count what they have


BROKEN_RECIPES = {
    b"ttt_steps: [": "not valid YAML",
    b"[" * 5000: "not valid YAML",
    b"ttt_steps: \xff": "r.yaml:1: not UTF-8",
    b"- ttt_steps": "a recipe is a mapping|Expected `object`",
    b"ttt_steps: 2026-01-01": "ttt_steps|Expected",
    b"ttt_steps: [[1]]": "Expected",
    b"draft_type: eagle3\ndraft-type: eagle3": "'draft_type' and 'draft-type' are the same flag",
}


@pytest.mark.parametrize("content", BROKEN_RECIPES, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize("name", ["train", "plan"])
def test_a_broken_recipe_is_one_line(name, content, tmp_path, capfd):

    (tmp_path / "r.yaml").write_bytes(content)
    assert run_command(name, ["--config", str(tmp_path / "r.yaml")]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert error.startswith(f"error: {tmp_path}/r.yaml") and re.search(
        BROKEN_RECIPES[content], error.replace("\n", " ")
    )


EMPTY = {
    "train": ["--output_dir", "", "--train_data_path", "a"],
    "export": ["head", "--to", "vllm", "--output-dir", ""],
    "bench": ["--target=", "--draft", "d"],
    "inspect": [" "],
    "extract": ["--model-name", "m", "--dataset-path", "a", "", "--output-dir", "out"],
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_value_is_refused(name, tmp_path, monkeypatch, capfd):
    """`--output_dir "$UNSET"` once wrote into the current folder."""
    monkeypatch.chdir(tmp_path)
    assert run_command(name, EMPTY[name]) == 2
    assert "is empty. Give a value" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_some_values_may_be_empty():
    refuse_empty(["--prompt", "", "--system=", "--gpus", "", "--output-dir", "out", "--private"])


ADDRESSES = {
    "train": ["--output_dir", "out", "--server"],
    "extract": ["--model-name", "m", "--dataset-path", "a", "--output-dir", "out", "--server"],
    "regenerate": ["--data-name-or-path", "a", "--output-dir", "out", "--endpoints"],
    "bench": ["--target", "t", "--mode", "baseline", "--backend", "server", "--eagle-url"],
}


@pytest.mark.parametrize("url", ["ftp://host", "host:99999", "http://[::1"])
@pytest.mark.parametrize("name", ADDRESSES)
def test_addresses_are_looked_at_before_anything_else(name, url, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run_command(name, [*ADDRESSES[name], url]) in (1, 2)
    assert f"{url!r} is no address of a server" in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def reported(word: str, tmp_path) -> list[str]:
    flags = ["--output_dir", str(tmp_path), "--report_to", word]
    return parse_args(TrainArgs, flags, prog="fledge train", description="").trainer.report_to


@pytest.mark.parametrize(("word", "message"), [
    ("wandb", "--report_to wandb: it cannot be used here .*wandb.* Install it"),
    ("tensorbord", "--report_to tensorbord: unknown .did you mean 'tensorboard'.*Known: "),
])  # fmt: skip
def test_a_tracker_that_is_not_there_is_refused_with_the_flags(word, message, tmp_path, monkeypatch):
    """The Trainer found out after the target was loaded, with a traceback."""
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(UserError, match=message):
        reported(word, tmp_path)


def test_trackers_that_are_there_are_accepted(tmp_path, monkeypatch):
    """Negative control; none is the default."""
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", lambda: object())
    assert reported("wandb", tmp_path) == ["wandb"]
    assert reported("none", tmp_path) == []


class Latin1:
    """stdin with a byte that is not UTF-8."""

    def read(self) -> str:
        return b"caf\xe9".decode()

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        return self.read()


@pytest.mark.parametrize("reader", ["decode", "chat"])
def test_standard_input_that_is_not_utf8_is_one_line(reader, monkeypatch):
    from fledge.commands.chat import next_turn
    from fledge.commands.decode import _standard_input

    read = {"decode": _standard_input, "chat": next_turn}[reader]
    monkeypatch.setattr("sys.stdin", Latin1())
    with pytest.raises(UserError, match="stdin is not UTF-8"):
        read()
    monkeypatch.setattr("sys.stdin", io.StringIO("café\n"))
    assert read().strip() == "café"  # negative control


@pytest.mark.parametrize(("flags", "message"), [
    (["--train_data_path", "/nowhere/x.jsonl"], "/nowhere/x.jsonl: no such file or folder"),
    (["--draft_model_config_path", "BAD"], "bad.json: not valid JSON|bad.json:1: not valid JSON"),
    (["--init_from", "/nowhere"], "/nowhere/config.json: no such file"),
])  # fmt: skip
def test_what_train_is_to_read_is_looked_at_before_the_target(flags, message, tmp_path, capfd):
    """The target named here does not exist: an error about it would mean that it was opened first."""
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    flags = [str(tmp_path / "bad.json") if word == "BAD" else word for word in flags]
    target = ["--target_model_name_or_path", "/no/target", "--output_dir", str(tmp_path / "out")]
    assert run_command("train", [*target, *flags]) == 1

    assert re.search(message, " ".join(capfd.readouterr().err.split()))
