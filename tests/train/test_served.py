"""Training from a target on servers is training online: same data, same order, losses within the server's rounding."""

import json
from pathlib import Path

import pytest
import torch
from fake_states_server import FakeStatesServer
from saved_target import save_target, write_conversations

from fledge.commands.train import TrainArgs, parse_args
from fledge.errors import UserError
from fledge.storage.states.manifest import read_manifest
from fledge.target.model import Target
from fledge.train import run
from fledge.train.arguments import TrainSettings

STEPS = 6
TOLERANCE = 1e-4  # fp32 both; the server's final norm sees all rows at once


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_target(folder / "target")
    write_conversations(folder / "talk.jsonl", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture
def server(work, tmp_path):
    started: list[FakeStatesServer] = []

    def start(delay_s: float = 0.0) -> str:
        (tmp_path / "states").mkdir(exist_ok=True)
        started.append(FakeStatesServer(work / "target", tmp_path / "states", [2, 4, 5, 8], delay_s))
        return started[-1].url

    yield start
    for one in started:
        one.close()


def arguments(work: Path, output: Path, *flags: object) -> TrainSettings:
    plain = (
        "--target_model_name_or_path", work / "target", "--train_data_path", work / "talk.jsonl",
        "--output_dir", output, "--max_steps", STEPS, "--per_device_train_batch_size", 2, "--ttt_steps", 3,
        "--draft_vocab_size", 64, "--bf16", False, "--logging_steps", 1, "--save_strategy", "no", "--use_cpu", True,
        "--disable_tqdm", True, "--eval_fraction", 0.2,
    )  # fmt: skip
    return parse_args(TrainArgs, [*map(str, plain), *map(str, flags)], prog="train", description="")


def losses(work: Path, output: Path, *flags: object) -> list[float]:
    run.train(arguments(work, output, *flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]


def test_training_from_servers_equals_training_online(work, server, tmp_path, monkeypatch):
    """Two servers, one of them slow; accumulation, so several batches are asked for at once."""
    more = ("--gradient_accumulation_steps", 2)
    online = losses(work, tmp_path / "online", *more)
    assert len(online) == STEPS + 1
    other_order = losses(work, tmp_path / "other", *more, "--seed", 8)
    urls = (server(), server(delay_s=0.05))

    def load(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(Target, "from_pretrained", load)
    folder = tmp_path / "states"
    served = losses(
        work, tmp_path / "served", "--target_backend", "vllm", "--server", *urls, "--server_folder", folder, *more
    )
    assert torch.allclose(torch.tensor(served), torch.tensor(online), rtol=TOLERANCE, atol=0)
    assert not torch.allclose(torch.tensor(other_order), torch.tensor(online), rtol=TOLERANCE, atol=0)  # control
    assert not list((tmp_path / "states").iterdir())


def test_a_store_is_filled_by_servers(work, server, tmp_path):
    url = server()
    served = ("--target_backend", "vllm", "--server", url, "--server_folder", tmp_path / "states")
    first = losses(work, tmp_path / "first", *served, "--train_hidden_path", tmp_path / "store")
    assert read_manifest(tmp_path / "store").identity.backend == "vllm"
    live = losses(work, tmp_path / "live", *served)
    assert first == live  # the store is a cache of this very source


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--target_backend", "vllm"), "needs --server URL. Start one: vllm serve"),
        (("--server", "http://127.0.0.1:9"), "--server is for --target-backend vllm"),
        (("--target_backend", "vllm", "--server", "http://127.0.0.1:9"), "no vLLM server answers there"),
        (
            ("--target_backend", "vllm", "--server", "http://127.0.0.1:9", "--dataloader_num_workers", 2),
            "--dataloader_num_workers cannot be used",
        ),
    ],
)
def test_flags_that_do_not_fit(work, tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        run.train(arguments(work, tmp_path / "out", *flags))
