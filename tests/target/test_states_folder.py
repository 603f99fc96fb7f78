"""What the client reads and removes when a server names a file of hidden states.

Before, any safetensors file the server named was loaded and then deleted.
"""

import fcntl
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from fledge.http_client import ServerError
from fledge.servers.states_folder import take_states

IDS, LAYERS, HIDDEN = [5, 6, 7], 2, 4
REQUEST = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "agreed"
    place.mkdir()
    return place


def write(path, **changes):
    tensors = {"hidden_states": torch.randn(len(IDS), LAYERS, HIDDEN), "token_ids": torch.tensor(IDS)}
    save_file({**tensors, **changes}, path)
    return path


def take(path, folder, **more):
    return take_states(str(path), REQUEST, IDS, LAYERS, HIDDEN, folder=folder, **more)


def test_the_file_asked_for_is_read_and_removed(folder):
    """Control."""
    path = write(folder / f"cmpl-{REQUEST}-0.safetensors")
    (folder / f"{path.name}.lock").touch()
    assert take(path, folder).shape == (3, LAYERS, HIDDEN)
    assert not list(folder.iterdir())


def test_an_agreed_folder_behind_a_link_is_the_same_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    path = write(folder / f"{REQUEST}.safetensors")
    assert take(path, tmp_path / "link").shape == (3, LAYERS, HIDDEN)


@pytest.mark.parametrize(
    "named",
    [
        "../{request}.safetensors", "sub/{request}.safetensors", "model.safetensors", "{request}.txt",
        "{request}.safetensors/../../{request}.safetensors", "link/{request}.safetensors", "nul\0.safetensors",
        "", "/", "..",
    ],
)  # fmt: skip
def test_no_other_path_is_read_or_removed(folder, tmp_path, named):
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path)
    files = [tmp_path / f"{REQUEST}.safetensors", folder / "sub" / f"{REQUEST}.safetensors",
             folder / "model.safetensors", folder / f"{REQUEST}.txt"]  # fmt: skip
    for file in files:
        write(file)
    with pytest.raises(ServerError, match="wrong path"):
        take(f"{folder}/{named.format(request=REQUEST)}", folder)
    assert all(file.is_file() for file in files)


def test_links_and_pipes_are_not_read(folder, tmp_path):
    """A link in the agreed folder, under our request's name, to somebody's model."""
    model, name = write(tmp_path / "model.safetensors"), f"{REQUEST}.safetensors"
    (folder / name).symlink_to(model)
    with pytest.raises(ServerError, match="no states"):
        take(folder / name, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ServerError, match="no regular file"):
        take(folder / name, folder)
    assert model.is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token_ids": torch.tensor([5, 6, 8])}, "other tokens"),
        ({"token_ids": torch.tensor([5.0, 6.0, 7.0])}, "other tokens"),
        ({"token_ids": torch.tensor([[5, 6, 7]])}, "other tokens"),
        ({"hidden_states": torch.randn(3, LAYERS + 1, HIDDEN)}, "needed are floats of shape"),
        ({"hidden_states": torch.randn(2, LAYERS, HIDDEN)}, "needed are floats of shape"),
        ({"hidden_states": torch.randn(3, LAYERS, HIDDEN + 1)}, "needed are floats of shape"),
        ({"hidden_states": torch.ones(3, LAYERS, HIDDEN, dtype=torch.int32)}, "needed are floats"),
        ({"hidden_states": torch.ones(3, LAYERS, HIDDEN, dtype=torch.float64)}, "needed are floats"),
        ({"hidden_states": torch.full((3, LAYERS, HIDDEN), float("nan"))}, "not finite"),
        ({"hidden_states": torch.full((3, LAYERS, HIDDEN), float("inf"))}, "not finite"),
        ({"more": torch.zeros(400_000)}, "larger than"),
    ],
)
def test_wrong_content_is_refused_and_left(folder, changes, says):
    path = write(folder / f"{REQUEST}.safetensors", **changes)
    with pytest.raises(ServerError, match=says):
        take(path, folder)
    assert path.is_file()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x08\0\0\0\0\0\0\0{}      ", b"no tensors at all"])
def test_what_is_no_safetensors_file(folder, content):
    path = folder / f"{REQUEST}.safetensors"
    path.write_bytes(content)
    with pytest.raises(ServerError, match="no file of hidden states"):
        take(path, folder)
    assert path.is_file()


def test_waiting_for_the_lock_ends(folder):
    """A writer that died with the lock open, or never lets go, held the client for ever."""
    path = write(folder / f"{REQUEST}.safetensors")
    with open(f"{path}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(ServerError, match="still locked by the server"):
            take(path, folder, lock_timeout_s=0.1)
        assert time.monotonic() - began < 3 and path.is_file()
    assert take(path, folder, lock_timeout_s=0.1) is not None  # control: the lock is free


def test_a_server_that_names_no_file_or_answers_oddly(tmp_path):
    """Three odd answers in a row end the extraction with one line; what the server names stays."""
    import asyncio
    import json

    from fakes.hostile_server import MODELS, http, serving

    from fledge.data.samples import Sample
    from fledge.errors import UserError
    from fledge.servers.hidden_states import EngineSource

    precious = write(tmp_path / "model.safetensors")
    answers = [b"<html>", b'{"kv_transfer_params": []}', b'{"kv_transfer_params": {"hidden_states_path": 5}}', b"{}",
               json.dumps({"kv_transfer_params": {"hidden_states_path": str(precious)}}).encode()]  # fmt: skip
    now = {"answer": b""}

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(MODELS if path.endswith("/models") else now["answer"]))

    ids = torch.tensor(IDS)
    with serving(handler) as url:
        source = EngineSource([url], torch.nn.Identity(), LAYERS - 1, HIDDEN, folder=tmp_path / "agreed")
        for now["answer"] in answers:
            with pytest.raises(UserError, match="sample 'a', attempt 3.*run the same command again"):
                source.record(Sample("a", ids, torch.ones(len(ids), dtype=torch.bool)))
    assert precious.is_file()
