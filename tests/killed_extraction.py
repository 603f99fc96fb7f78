"""Extract a tiny store in child processes that are killed at random moments: TARGET DATA FOLDER KILLS.

One process imports and loads; each attempt is a fork of it, killed with SIGKILL after a random time. A finished store
is put aside and another begun, until KILLS attempts were really killed at work. Prints a JSON line with the count.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fledge.extraction.extract import Samples, fill, open_target
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.manifest import MANIFEST
from fledge.storage.states.reader import HiddenStore


def main(target: str, data: str, folder: Path, wanted: int) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # type: ignore[assignment]
    args = ExtractSettings(target=target, data=[data], output_dir=folder, model_max_length=120)
    opened = open_target(args)
    samples = Samples.read(args, opened.template)

    def run(store: Path) -> None:
        fill(store, opened.identity, opened.head, opened.producer, samples, shard_bytes=2**18)

    start = time.monotonic()
    run(folder / "store-0")
    whole = time.monotonic() - start
    chance, kills, number = random.Random(0), 0, 1
    while kills < wanted:
        store = folder / f"store-{number}"
        killed = attempt(functools.partial(run, store), chance.uniform(0, whole / 2))
        kills += killed
        if (store / MANIFEST).is_file():
            HiddenStore(store, allow_incomplete=True).verify()
        number += not killed
    run(folder / f"store-{number}")
    print(json.dumps({"kills": kills, "stores": number}))


def attempt(work, seconds: float) -> bool:
    """Do the work in a child that lives at most so long. True when it was killed before it finished."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "a child failed"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
