"""A checkpoint goes on only with all of its state, and with the target and the data it learned from."""

import shutil
from pathlib import Path

import pytest
import torch
from saved_target import save_target, write_conversations

from fledge.commands.train import TrainArgs, parse_args
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.reader import HiddenStore
from fledge.target.head import TargetEnds
from fledge.train import run
from fledge.train.arguments import TrainSettings
from fledge.train.continuation import check_resumable, weights_digest
from fledge.train.stored import stored_source

pytestmark = pytest.mark.usefixtures("own_cache")

PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoint(folder: Path, names=PARTS) -> Path:
    folder.mkdir()
    for name in names:
        torch.save({"state": torch.zeros(2)}, folder / name)
    return folder


@pytest.mark.parametrize("name", PARTS)
def test_a_checkpoint_without_part_of_its_state_is_refused(name, tmp_path):
    """The Trainer goes on without a word, with a fresh optimizer, schedule or random state."""
    what = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "rng_state.pth": "random state"}[name]
    folder = checkpoint(tmp_path / "checkpoint-2", [part for part in PARTS if part != name])
    with pytest.raises(UserError, match=f"checkpoint-2: its {what} is missing.*{name[:9]}"):
        check_resumable(folder)


@pytest.mark.parametrize("name", PARTS)
def test_a_cut_part_is_refused(name, tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-2")
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{name}: cut or damaged"):
        check_resumable(folder)


def test_whole_checkpoints_pass(tmp_path):
    """Negative control: of one process, of several, of FSDP and of DeepSpeed."""
    check_resumable(checkpoint(tmp_path / "one"))
    check_resumable(
        checkpoint(tmp_path / "two", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"])
    )
    check_resumable(checkpoint(tmp_path / "fsdp", ["optimizer.bin", "scheduler.pt", "rng_state_0.pth"]))
    deepspeed = checkpoint(tmp_path / "deepspeed", ["rng_state_0.pth"])
    (deepspeed / "global_step2").mkdir()
    check_resumable(deepspeed)


def test_a_digest_sees_any_tensor_and_any_shape():
    weights = {"a": torch.ones(1000), "b": torch.zeros(3, 4)}
    digest = weights_digest(weights.items())
    assert weights_digest(weights.items()) == digest
    assert weights_digest((weights | {"a": weights["a"] * 1.01}).items()) != digest
    assert weights_digest((weights | {"b": torch.zeros(4, 3)}).items()) != digest


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Two targets of one shape, two files of conversations, and stores of the four pairs."""
    folder = tmp_path_factory.mktemp("work")
    for number in (0, 1):
        save_target(folder / f"target-{number}", seed=number)
        write_conversations(folder / f"data-{number}.jsonl", 8, seed=number)
    for target, data in ((0, 0), (1, 0), (0, 1)):
        extract(ExtractSettings(target=str(folder / f"target-{target}"), output_dir=folder / f"store-{target}-{data}",
                            data=[str(folder / f"data-{data}.jsonl")]))  # fmt: skip
    return folder


def arguments(output: Path, *flags: object) -> TrainSettings:
    plain = ["--output_dir", str(output), "--per_device_train_batch_size", "2", "--ttt_steps", "2", "--use_cpu", "True",
             "--draft_vocab_size", "64", "--bf16", "False", "--save_steps", "1", "--disable_tqdm", "True"]  # fmt: skip
    return parse_args(TrainArgs, [*plain, *map(str, flags)], prog="train", description="")


def from_store(folder: Path, *flags: object) -> list[object]:
    return ["--train_hidden_path", folder / "store", *flags]


def live(folder: Path, *flags: object) -> list[object]:
    return ["--target_model_name_or_path", folder / "target", "--train_data_path", folder / "data.jsonl", *flags]


def put(work: Path, place: Path, target: int = 0, data: int = 0) -> None:
    """What lies under the names that the flags give."""
    for name in ("store", "target"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(work / f"store-{target}-{data}", place / "store")
    shutil.copytree(work / f"target-{target}", place / "target")
    shutil.copy(work / f"data-{data}.jsonl", place / "data.jsonl")


@pytest.mark.parametrize("flags", [from_store, live])
def test_a_run_continues_with_what_it_was_started_with(flags, work, tmp_path):
    """Another target or other data under the same path went unnoticed; the head learned from a mixture."""
    out = tmp_path / "out"
    put(work, tmp_path)
    run.train(arguments(out, *flags(tmp_path, "--max_steps", 1)))
    for changed, message in (({"target": 1}, "the target|the training data"), ({"data": 1}, "the training data")):
        put(work, tmp_path, **changed)
        with pytest.raises(UserError, match=rf"({message}).* is not what the run there was started with"):
            run.train(arguments(out, *flags(tmp_path, "--max_steps", 2)))
    put(work, tmp_path)
    run.train(arguments(out, *flags(tmp_path, "--max_steps", 2)))  # negative control: the same again
    assert (out / "checkpoint-2").is_dir()


def test_a_target_with_other_weights_than_the_store_is_refused(work, tmp_path):
    """Of one shape and name: only its config was compared."""
    put(work, tmp_path)
    same = arguments(tmp_path / "out", *from_store(tmp_path, "--target_model_name_or_path", tmp_path / "target"))
    stored_source(same)  # negative control
    shutil.rmtree(tmp_path / "target")
    shutil.copytree(work / "target-1", tmp_path / "target")
    with pytest.raises(UserError, match="the weights of embedding and head differ"):
        stored_source(same)


def test_a_store_that_is_replaced_while_it_is_read_is_noticed(work, tmp_path):
    """The same data by another target: files of the same names and sizes."""
    put(work, tmp_path)
    stored = HiddenStore(tmp_path / "store")
    stored[0]  # negative control
    put(work, tmp_path, target=1)
    with pytest.raises(UserError, match="the checksum of record .* does not match"):
        stored[0]


def test_a_cut_file_of_the_target_is_one_line(work, tmp_path):
    put(work, tmp_path)
    TargetEnds.from_files(str(tmp_path / "target"))  # negative control
    path = tmp_path / "target" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        TargetEnds.from_files(str(tmp_path / "target"))
