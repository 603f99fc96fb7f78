"""What commands do to folders: nothing of others is lost, nothing is touched too early, one writer at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import filled, make_read_only, small_disk
from kills import KILLS, tree
from saved_target import save_target, write_conversations
from tiny import tiny_draft

from fledge import outputs
from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.storage.states.reader import HiddenStore
from fledge.target.model import Target

Words = Callable[[Path, Path], list]  # the inputs, the output folder -> a command line

COMMANDS: dict[str, Words] = {
    "train": lambda p, out: [
        "train", "--target_model_name_or_path", p / "target", "--train_data_path", p / "data.jsonl",
        "--output_dir", out, "--max_steps", 4, "--save_steps", 2, "--ttt_steps", 2, "--draft_vocab_size", 64,
        "--use_cpu", True, "--disable_tqdm", True, "--bf16", False, "--per_device_train_batch_size", 2,
        "--save_dtype", "float32",
    ],
    "extract": lambda p, out: [
        "extract", "--model-name", p / "target", "--dataset-path", p / "data.jsonl", "--output-dir", out,
        "--shard-mb", 0.05,
    ],
    "regenerate": lambda p, out: [
        "regenerate", "--engine", "transformers", "--model", p / "target", "--data-name-or-path", p / "data.jsonl",
        "--output-dir", out, "--max-tokens", 4, "--max-reject-share", 1, "--data-shard-size", 3, "--batch-size", 2,
    ],
    "export": lambda p, out: ["export", p / "head", "--to", "vllm", "--output-dir", out],
    "convert": lambda p, out: ["convert", p / "head", "--output-dir", out],
    "bench": lambda p, out: [
        "bench", "--target", p / "target", "--draft", p / "head", "--output-dir", out, "--bench-name", "quick",
        "--question-end", 2, "--max-new-token", 6, "--temperature", 0, "--total-token", 4, "--depth", 1, "--top-k", 2,
        "--num-gpus-total", 0, "--samples", 0,
    ],
}  # fmt: skip
IN_THE_WAY = {
    "train": ("model.safetensors", "checkpoint-1000/adapter_model.bin"),
    "extract": ("manifest.json", "shard-00000.safetensors"),
    "regenerate": ("rejects.jsonl", "run.json"),
    "export": ("README.md", "model.safetensors"),
    "convert": ("config.json", "model.safetensors"),
    "bench": ("report.md", "run.json"),
}
INPUT = {"train": "data.jsonl", "extract": "data.jsonl", "regenerate": "data.jsonl", "export": "head",
         "convert": "head", "bench": "head"}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    target = save_target(folder / "target")
    write_conversations(folder / "data.jsonl", 10)
    save_draft(tiny_draft(Target.from_pretrained(str(target))), folder / "head", dtype=torch.float32)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(words: list) -> int:
    return run_command(words[0], [str(word) for word in words[1:]])


@pytest.fixture
def forked(launch) -> Callable[[list[list]], list]:
    """What steps come to, each in a process of its own (tests/forked_commands.py)."""
    script = Path(__file__).parents[1] / "forked_commands.py"

    def run_all(steps: list[list]) -> list:
        done = launch([script, json.dumps(steps, default=str)], timeout_s=1200)
        return json.loads(done.stdout.splitlines()[-1])

    return run_all


def foreign_folder(folder: Path, command: str) -> dict[str, bytes]:
    for name in (*IN_THE_WAY[command], "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{} of somebody else")
    return tree(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_others_stay_until_overwrite_is_said(command, inputs, tmp_path, capsys):
    """`fledge train` used to delete another tool's checkpoint-1000 before it had looked at its inputs; export replaced
    a README.md, regenerate a rejects.jsonl."""
    out, words = tmp_path / "out", COMMANDS[command](inputs, tmp_path / "out")
    before = foreign_folder(out, command)
    assert run(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and IN_THE_WAY[command][0].split("/")[0] in said and "--overwrite" in said, said
    assert tree(out) == before
    assert run([*words, "--overwrite"]) == 0  # and with it the same command works
    assert (out / "notes.txt").read_bytes() == before["notes.txt"]
    assert not any((out / name).exists() and (out / name).read_bytes() == before[name] for name in IN_THE_WAY[command])
    assert run(words) == 0  # now it is its own


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_touched_before_the_inputs_were_read(command, inputs, tmp_path, capsys):
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(inputs, broken)
    outputs.delete([broken / INPUT[command]])
    assert run(COMMANDS[command](broken, out)) == 1
    assert INPUT[command] in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_two_starts_at_once(command, inputs, tmp_path, capsys):
    """One process holds the folder; the command says so, exits with 1 and has touched nothing."""
    out, words = tmp_path / "out", COMMANDS[command](inputs, tmp_path / "out")
    out.mkdir()
    with outputs.claim(out, outputs.Output(command, ())):
        before = tree(out)
        assert run(words) == 1
        assert "another run is writing there" in capsys.readouterr().err
        assert tree(out) == before
    assert run(words) == 0


def test_of_two_started_together_at_most_one_gives_way(forked, inputs, tmp_path):
    """Both succeed where the second starts when the first has ended; never do both fail, and what is left is whole."""
    words = {name: COMMANDS[name](inputs, tmp_path / name) for name in COMMANDS}
    found = forked([[kind, words[name]] for name in COMMANDS for kind in ("together", "run")])
    assert all(statuses in ([0, 0], [0, 1]) for statuses in found[::2]) and not any(found[1::2]), found
    assert not [path for path in tmp_path.glob(".*") if path.name != ".cache"]


@pytest.mark.parametrize("command", COMMANDS)
def test_read_only_and_full_disks_are_named(command, inputs, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "8m") as disk:
        words = COMMANDS[command](inputs, disk / "out")
        with filled(disk, 8192):
            assert run(words) == 1
            said = capsys.readouterr().err
            assert str(disk) in said and any(word in said for word in ("no space", "full", "are needed")), said
        assert run(words) == 0  # room again
        before = tree(disk)
        make_read_only(disk)
        assert run(COMMANDS[command](inputs, disk / "new")) == 1
        said = capsys.readouterr().err
        assert str(disk) in said and "read-only" in said, said
        assert tree(disk) == before


@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_second_head_on_a_full_disk_leaves_the_first_intact(command, inputs, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        words = COMMANDS[command](inputs, disk / "out")
        assert run(words) == 0
        before = tree(disk / "out")
        with filled(disk, 65536):
            assert run(words) == 1
        after = tree(disk / "out")
        assert {name: after[name] for name in before if name != outputs.LOCK} == {
            name: before[name] for name in before if name != outputs.LOCK
        }


def test_everybody_whom_the_umask_lets_can_read_the_output(forked, inputs, tmp_path):
    """Trained heads were readable by their owner alone, and a server in a container could not load them."""
    words = {name: COMMANDS[name](inputs, tmp_path / name) for name in COMMANDS}
    assert not any(forked([["umask", 0o022, words[name]] for name in COMMANDS]))
    for name in COMMANDS:
        for path in (tmp_path / name).rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_head_is_not_written_over_itself(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(COMMANDS["export"](inputs, out)) == 0
    before = tree(out)
    assert run(["export", out, "--to", "sglang", "--output-dir", out]) == 1
    assert "is the head that is read" in capsys.readouterr().err and tree(out) == before
    assert run(["export", out, "--to", "sglang", "--output-dir", tmp_path / "other"]) == 0  # control


def test_a_finished_head_is_not_trained_over(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*COMMANDS["train"](inputs, out), "--save_strategy", "no"]
    assert run(words) == 0
    before = tree(out)
    assert run(words) == 1
    assert "holds model.safetensors of an earlier run" in capsys.readouterr().err and tree(out) == before
    assert run([*words, "--overwrite"]) == 0
    capsys.readouterr()
    saving = [*COMMANDS["train"](inputs, out), "--overwrite"]
    assert run(saving) == 0  # checkpoints of the run are continued, so nothing stands in the way
    assert run(COMMANDS["train"](inputs, out)) == 0
    assert run([*COMMANDS["train"](inputs, out), "--resume_from_checkpoint", "False"]) == 1
    assert "checkpoint-2" in capsys.readouterr().err


def test_only_checkpoints_of_the_run_are_deleted(inputs, tmp_path, capsys):
    """The Trainer's rotation deletes the oldest folders named checkpoint-N, whoever made them."""
    out, words = tmp_path / "out", [*COMMANDS["train"](inputs, tmp_path / "out"), "--save_total_limit", 1]
    assert run([*words, "--max_steps", 2]) == 0
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-best" / "model.bin").write_text("mine")
    assert run(words) == 0
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-best"]
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-1")
    (out / "checkpoint-1" / outputs.MARKER).unlink()
    assert run(words) == 1
    assert "checkpoint-1 is not of the run in this folder" in capsys.readouterr().err
    assert (out / "checkpoint-1" / WEIGHTS).is_file()


def test_a_run_from_before_there_were_markers_is_continued(inputs, tmp_path, capsys):
    out, words = tmp_path / "out", COMMANDS["train"](inputs, tmp_path / "out")
    assert run([*words, "--max_steps", 2]) == 0
    for path in [*out.rglob(outputs.MARKER), *out.rglob(outputs.LOCK)]:
        path.unlink()
    assert run(words) == 0
    assert "resuming from" in capsys.readouterr().err


def kill(forked: Callable[[list[list]], list], command: str, inputs: Path, folder: Path, *flags: object) -> list[Path]:
    """Run a command undisturbed, kill others of the kind, and let the last one end. Returns all their folders. The
    first run of all compiles and measures, and would say nothing of how long others take."""
    first, whole, killed = (
        [*COMMANDS[command](inputs, folder / name), *flags] for name in ("first", "whole", "killed")
    )  # fmt: skip
    steps = [["run", first], ["run", whole], ["kill", KILLS, folder / "killed", killed], ["run", killed]]
    assert forked(steps) == [0, 0, KILLS, 0]
    return [folder / "whole", *sorted(folder.glob("killed*"))]


def test_killed_trainings_end_as_one_that_was_not(forked, inputs, tmp_path):
    def end(folder: Path) -> tuple[bytes, list[float], set[str]]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return (folder / WEIGHTS).read_bytes(), [one["loss"] for one in history if "loss" in one], set(tree(folder))

    whole, *killed = kill(forked, "train", inputs, tmp_path, "--max_steps", 12, "--logging_steps", 1)
    assert killed and all(end(folder) == end(whole) for folder in killed)


def test_killed_benchmarks_measure_every_question_once(forked, inputs, tmp_path):
    for folder in kill(forked, "bench", inputs, tmp_path, "--question-end", 24):
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert len({row["question_id"] for row in rows}) == len(rows) == 24
        assert json.loads((folder / "summary.json").read_text())["sets"]["quick"]["questions"] == 24


def test_killed_exports_leave_a_head_or_none(forked, inputs, tmp_path):
    whole, *killed = kill(forked, "export", inputs, tmp_path)
    assert all((folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes() for folder in killed)
    assert not list(tmp_path.glob(".killed*"))


def test_extraction_keeps_its_store_when_told_to_overwrite(inputs, tmp_path):
    """--overwrite is about files of others: an own store is continued."""
    words = COMMANDS["extract"](inputs, tmp_path / "out")
    assert run(words) == 0
    shard = next((tmp_path / "out").glob("shard-*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert run([*words, "--overwrite"]) == 0
    assert shard.stat().st_mtime_ns == before and len(HiddenStore(tmp_path / "out")) == 10
