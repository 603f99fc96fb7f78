"""The folder that servers and client share for hidden states: what is read from it, and what is removed.

A server names a file; it is not trusted to name the right one. Read is only a regular file directly inside the agreed
folder whose name holds the id of our own request (drawn at random, so no other file has it). It is removed only after
its content is what was asked for: a server cannot make us read or delete anything else.
"""

import fcntl
import os
import stat
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fledge.http_client import ServerError, one_line
from fledge.servers.settings import SERVER_FOLDER

LOCK_TIMEOUT_S = 300.0
LOCK_POLL_S = 0.005
HEADER_BYTES = 1 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# T tokens, L layers asked for, H hidden


def take_states(
    named: str, request_id: str, token_ids: Sequence[int], num_layers: int, hidden_size: int, *,
    folder: Path = SERVER_FOLDER, lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Tensor:  # fmt: skip
    """The (T, L, H) states in the file that a server names; the file and its lock are removed when they are right.

    Raises ServerError. Waits for the writer, who holds the lock until the file is whole.
    """
    path = _inside(named, request_id, folder)
    lock = path.with_name(f"{path.name}.lock")
    _wait_for_writer(lock, lock_timeout_s)
    most = len(token_ids) * (num_layers * hidden_size * 4 + 8) + HEADER_BYTES
    with _regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ServerError("wrong states", f"{path}: larger than {most} bytes, the most that these states can be")
    states = _checked(path, content, token_ids, num_layers, hidden_size)
    path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return states


def _inside(named: str, request_id: str, folder: Path) -> Path:
    """The named path, when it lies directly in the agreed folder and is of our request."""
    try:
        path = Path(os.path.realpath(os.path.dirname(named))) / os.path.basename(named)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise ServerError("wrong path", f"{named[:200]!r}: {error}") from None
    if path.parent != Path(os.path.realpath(folder)):
        raise ServerError(
            "wrong path",
            f"the server names {named[:200]!r}, which is not in {folder}. Give the folder it writes to "
            f"(its shared_storage_path) with --server-folder",
        )
    if path.suffix != ".safetensors" or request_id not in path.name:
        raise ServerError("wrong path", f"the server names {named[:200]!r}, no file of our request {request_id}")
    return path


@contextmanager
def _regular(path: Path):
    """The file, opened; no symbolic link, no device, no pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ServerError(
            "no states",
            f"{path}: {error.strerror}. Client and server must share the folder; without CUDA the server needs "
            f"fledge's connector (fledge.servers.vllm_connector)",
        ) from None
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ServerError("wrong path", f"{path}: is no regular file")
        yield file


def _wait_for_writer(lock: Path, timeout_s: float) -> None:
    if not os.path.lexists(lock):
        return
    end = time.monotonic() + timeout_s
    with _regular(lock) as file:
        while not _locked_for_reading(file):
            if time.monotonic() > end:
                raise ServerError("time-out", f"{lock}: still locked by the server after {timeout_s:.0f} s")
            time.sleep(LOCK_POLL_S)


def _locked_for_reading(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _checked(path: Path, content: bytes, token_ids: Sequence[int], num_layers: int, hidden_size: int) -> Tensor:
    try:
        saved = load(content)
        states, ids = saved["hidden_states"], saved["token_ids"]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ServerError("wrong states", f"{path}: no file of hidden states ({one_line(error)})") from None
    if ids.dtype not in (torch.int32, torch.int64) or ids.tolist() != list(token_ids):
        raise ServerError("wrong states", f"{path}: states of other tokens than asked for")
    wanted = (len(token_ids), num_layers, hidden_size)
    if states.dtype not in DTYPES or tuple(states.shape) != wanted:
        raise ServerError(
            "wrong states",
            f"{path}: {states.dtype} of shape {tuple(states.shape)}; needed are floats of shape {wanted}, the taps and "
            f"the last layer. Start the server with the flags that `fledge extract --target-backend vllm` prints",
        )
    if not bool(torch.isfinite(states).all()):
        raise ServerError("wrong states", f"{path}: some states are not finite")
    return states
