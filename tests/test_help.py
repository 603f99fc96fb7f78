"""`fledge COMMAND --help`: short, quick, most used flags first; `--help-all` lists every flag; other tools' names work.

What a command runs is not imported for it: torch alone takes longer than a reader waits.
"""

import dataclasses
import importlib
import os
import subprocess
import sys

import pytest

from fledge.cli import COMMANDS, run_command
from fledge.commands.aliases import ALIASES, translated
from fledge.commands.flags import Flag, flags_of, text_of
from fledge.commands.help import value_of
from fledge.commands.parser import parse, words_of
from fledge.errors import UserError

LONGEST = 60  # lines: a screen and a half
HEAVY = {"torch", "transformers", "numpy", "datasets", "safetensors"}
PATIENCE_S = 1.5  # of processor time: how busy the machine is does not count
MOST_FLAGS = 145  # different names in all commands together
MOST_OWN = 105  # of them, those that nobody else gave
THEIRS = {  # names that users bring along, in the spelling of where they come from
    "AngelSlim": """base_port batch_size bench_name chat_template_type data_format data_shard_size depth lm_head_key
        max_clients max_gpu_memory max_pixels min_pixels model_id model_max_length num_gpus_per_model num_gpus_total
        num_proc num_threads question_begin question_end target_backend temperature top_k total_token""",
    "Trainer": "activation_checkpointing bf16 num_train_epochs output_dir per_device_train_batch_size push_to_hub seed",
    "transformers' generate": "max_new_tokens min_p repetition_penalty top_p",
    "vLLM": """dtype generation_config host max_model_len num_speculative_tokens stop tensor_parallel_size
        trust_remote_code""",
}
PROBE = f"""
import sys, time
from fledge.cli import run_command
status = run_command(sys.argv[1], ["--help"])
assert time.process_time() < {PATIENCE_S}, "the help took longer than {PATIENCE_S} s"
heavy = {HEAVY} & set(sys.modules)
assert not heavy, f"imported for the help: {{sorted(heavy)}}"
sys.exit(status)
"""


def args_class(name: str) -> type:
    return getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].args)


def own_flags(commands: list[str]) -> set[str]:
    """The names of our own flags; one that several commands have counts once."""
    flags = [flag for name in commands for flag in flags_of(args_class(name))]
    return {flag.name for flag in flags if not flag.hidden and not flag.positional}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_imports_nothing_heavy(name):
    shown = subprocess.run(
        [sys.executable, "-c", PROBE, name],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) <= LONGEST and max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: fledge {name}")


def test_the_probe_finds_a_heavy_import():
    """Negative control."""
    heavy = PROBE.replace("heavy =", "import numpy\nheavy =")
    shown = subprocess.run([sys.executable, "-c", heavy, "report"], capture_output=True, text=True, timeout=60)
    assert "imported for the help: ['numpy']" in shown.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_explains_every_flag(name, capsys):
    assert run_command(name, ["--help-all"]) == 0
    text = capsys.readouterr().out
    for flag in flags_of(args_class(name)):
        spelt = flag.name.upper() if flag.positional else flag.name.replace("_", "-")
        assert flag.hidden or f"{spelt}" in text
    assert not [line for line in text.splitlines() if line.startswith("  --") and line.strip() == line.strip("- ")]


def test_help_all_of_train_has_the_trainers_arguments(capsys):
    run_command("train", ["--help-all"])
    text = capsys.readouterr().out
    assert "--fsdp" in text and "--warmup-ratio" in text and "--ttt-steps" in text


def test_what_train_says_of_the_trainer_is_true():
    """`--help` names the Trainer's arguments without asking it: names and defaults must be its own."""
    from fledge.commands.train import TrainerHelp
    from fledge.train.arguments import TrainerArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainerArguments)}
    for field in dataclasses.fields(TrainerHelp):
        default = theirs[field.name]
        if field.name != "output_dir":  # which the library does not require
            assert getattr(default, "value", default) == field.default, field.name


def test_every_flag_has_a_text():
    flags = [flag for name in COMMANDS for flag in flags_of(args_class(name)) if not flag.hidden]
    assert [flag.name for flag in flags if not text_of(flag)] == []


def test_flags_of_our_own_stay_few():
    """dev/log has the numbers before one name stood for a thing in every command."""
    names = own_flags(list(COMMANDS))
    theirs = {name for some in THEIRS.values() for name in some.split()}
    assert theirs <= names and len(theirs) == sum(len(some.split()) for some in THEIRS.values())
    assert len(names) <= MOST_FLAGS and len(names - theirs) <= MOST_OWN
    assert len(own_flags(["decode", "chat"])) < len(own_flags(["decode"])) + 5  # they share nearly all


SAME = {
    "target": ("serve", "decode", "chat", "bench", "plan", "extract", "train", "inspect", "export", "convert",
               "quickstart", "regenerate"),
    "draft": ("serve", "decode", "chat", "bench"),
    "data": ("regenerate", "plan", "extract", "train", "inspect", "quickstart"),
    "states": ("train",),
    "output_dir": ("regenerate", "extract", "bench", "export", "convert", "serve", "quickstart"),
    "max_new_tokens": ("decode", "chat", "bench", "regenerate", "quickstart"),
    "sample_top_k": ("decode", "chat", "bench", "regenerate"),
    "server": ("regenerate", "extract", "train"),
    "temperature": ("decode", "chat", "bench", "regenerate"),
    "seed": ("decode", "chat", "bench", "regenerate"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_one_name_for_a_thing(name):
    commands = {command for command in COMMANDS if name in {flag.name for flag in flags_of(args_class(command))}}
    assert commands >= set(SAME[name])


def test_one_default_temperature():
    """regenerate alone draws: several answers at temperature 0 would be the same."""
    defaults = {
        command: flag.default
        for command in ("decode", "chat", "bench") for flag in flags_of(args_class(command))
        if flag.name == "temperature"
    }  # fmt: skip
    assert defaults == {"decode": 0.0, "chat": 0.0, "bench": 0.0}


def test_other_names_are_translated_where_ours_exist():
    assert translated("eagle_model_path", ["draft"]) == "draft"
    assert translated("model_name", ["model_name", "target"]) == "model_name"  # a flag of the command itself
    assert translated("eagle_model_path", ["target"]) == "eagle_model_path"


@pytest.mark.parametrize("other", ALIASES)
def test_every_alias_leads_to_a_flag_and_is_not_listed(other, capsys):
    ours = ALIASES[other]
    assert any(ours == flag.name for command in COMMANDS for flag in flags_of(args_class(command)))
    for command in COMMANDS:
        run_command(command, ["--help"])
        assert f"--{other.replace('_', '-')} " not in capsys.readouterr().out or other in {
            flag.name for flag in flags_of(args_class(command))
        }


@dataclasses.dataclass
class Flags:
    """Flags of a test."""

    target: str = ""
    some_layers: tuple[int, ...] = ()
    measure: bool = True
    quick: bool = False


@pytest.mark.parametrize(("words", "read"), [
    (["--model_name", "T"], ["--target", "T"]),
    (["--some_layers", "1", "2"], ["--some-layers", "1", "2"]),
    (["--quick", "True", "--measure", "false"], ["--quick", "--no-measure"]),
    (["--quick=false"], ["--no-quick"]),
    (["--quick", "surplus"], ["--quick", "surplus"]),  # the parser refuses the word
    (["--target=a=b"], ["--target=a=b"]),
    (["--their_own", "1"], ["--their_own", "1"]),
])  # fmt: skip
def test_one_spelling(words, read):
    assert words_of(Flags, words, foreign=["their_own"]) == read


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_flags_get_the_nearest_name(name, capfd):
    first = next(flag.name for flag in flags_of(args_class(name)) if not flag.positional and not flag.hidden)
    assert run_command(name, [f"--{first}z"]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert f"unknown flag '--{first}z'" in error and f"'--{first.replace('_', '-')}'" in error


def test_a_switch_takes_true_or_false_only():
    with pytest.raises(UserError, match="--quick is 'maybe'; it must be true or false"):
        words_of(Flags, ["--quick=maybe"])


def test_recipes_know_other_names(tmp_path):
    (tmp_path / "r.yaml").write_text("model_name_or_path: T\nmeasure: false\nsome-layers: [1, 2]\nquick: null\n")
    args = parse(Flags, ["--config", str(tmp_path / "r.yaml"), "--quick"], prog="x")
    assert args == Flags(target="T", some_layers=(1, 2), measure=False, quick=True)


@pytest.mark.parametrize(("name", "value"), [("target", "TEXT"), ("some_layers", "N ..."), ("measure", "")])
def test_values_are_named_by_their_type(name, value):
    flag: Flag = next(flag for flag in flags_of(Flags) if flag.name == name)
    assert value_of(flag.kind) == value


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["train", "--help-all"]])
def test_a_reader_that_has_enough_is_no_error(words):
    """`fledge export --help | head` ended with "Broken pipe"."""
    command = [sys.executable, "-m", "fledge", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert said == "" and process.returncode == 0
