"""SIGKILL at 25 random moments: the shards are byte for byte those of an uninterrupted run."""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from fakes.openai_server import FakeServer, ServerThread

from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.regeneration.settings import EngineSettings, PromptSourceSettings

KILLS = 25
ROWS = 2500
SHARD = 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_25_times(tmp_path):
    data = tmp_path / "in.jsonl"
    with open(data, "w") as out:
        for index in range(ROWS):
            fault = {7: " [fault: 500 x1]", 11: " [fault: 422]"}.get(index % 50, "")
            row = {"id": f"row-{index}", "conversations": [{"from": "human", "value": f"question {index}{fault}"}]}
            out.write(json.dumps(row) + "\n")
    server = ServerThread(FakeServer(delay_s=0.02))
    try:
        kills = kill_again_and_again(data, tmp_path / "killed", server.url)
        assert kills >= KILLS
        manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
        assert manifest["shards"] and not manifest["complete"]  # they hit the work, not just the start or the end
        assert finish(data, tmp_path / "killed", server.url) == 0
        assert finish(data, tmp_path / "whole", server.url) == 0
    finally:
        server.stop()
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert list(killed) == list(whole) and len(whole) == -(-ROWS // SHARD) + 1
    assert killed == whole
    lines = [line for name, text in killed.items() for line in text.decode().splitlines()]
    ids = [json.loads(line)["id"] for line in lines]
    assert sorted(ids) == sorted(f"row-{index}" for index in range(ROWS))  # rejects included: every id once
    assert json.loads((tmp_path / "killed" / "manifest.json").read_text())["complete"]


def kill_again_and_again(data: Path, out: Path, url: str) -> int:
    """Start, kill, and so on: a quarter of the kills anywhere while it starts, the others once it works (which takes
    long on a busy machine). A run that ends before its kill does not count."""
    moments, start_s = random.Random(0), 0.3
    for kills in range(KILLS):
        before, began = written(out), time.monotonic()
        child = start(data, out, url)
        if kills % 4 == 3:
            time.sleep(moments.uniform(0.0, start_s))
        else:
            while written(out) == before and time.monotonic() - began < 60:
                time.sleep(0.002)
            start_s = time.monotonic() - began
            time.sleep(moments.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return kills
    return KILLS


def written(out: Path) -> int:
    """Bytes of finished rows."""
    total = 0
    for path in [*out.glob("shard-*.jsonl"), *out.glob(".journal/*.partial")]:
        with contextlib.suppress(FileNotFoundError):  # sealed meanwhile
            total += path.stat().st_size
    return total


def finish(data: Path, out: Path, url: str) -> int:
    _, status = os.waitpid(start(data, out, url), 0)
    return os.waitstatus_to_exitcode(status)


def start(data: Path, out: Path, url: str) -> int:
    """A forked process that regenerates (starting Python anew each time would take a minute of imports)."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        regenerate(
            RegenerateArgs(
                prompts=PromptSourceSettings(data=str(data)), output_dir=out, data_shard_size=SHARD,
                engines=EngineSettings(server=(url,), concurrency=16),
            )
        )  # fmt: skip
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted([*out.glob("shard-*"), out / "rejects.jsonl"])}
