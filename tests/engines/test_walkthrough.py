"""docs/walkthrough.md, executed: its blocks, in order, in a clean folder, as a newcomer would type them.

Afterwards each step's result is looked at, and the wall time of every step is printed. Some twenty minutes on two cores
with nothing else to do. FLEDGE_WALK names a folder to keep what was made (else pytest's).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import BLOCK, ROOT
from safetensors import safe_open

from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.storage.states.reader import HiddenStore
from fledge.target.model import Target

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(5400)]
PAGE = "docs/walkthrough.md"
STEPS = ("Target and prompts", "Serve", "Regenerate", "Extract", "Train online", "Train offline", "Bench", "Export",
         "The head in vLLM")  # fmt: skip
ROWS = 320
MINUTES = 60  # what a newcomer on two cores may need


@dataclass(frozen=True)
class Walk:
    folder: Path
    printed: str
    seconds: dict[str, float]

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def steps(page: str = PAGE) -> dict[str, str]:
    """The blocks to run, by the heading they stand under."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title = section.splitlines()[0].lstrip("0123456789. ")
        shell = "".join(match["text"] for match in BLOCK.finditer(section) if match["how"] == "engines")
        if shell:
            found[title] = shell
    return found


def script(shells: dict[str, str], port: int) -> str:
    """All steps in one shell that stops at the first failure, leaves no server behind and notes the time."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, shell in enumerate(shells.values(), 1):
        lines += [f"date +%s.%N >times-{number}", shell.replace("6100", str(port))]
    return "\n".join([*lines, f"date +%s.%N >times-{len(shells) + 1}"])


def run(folder: Path, shells: dict[str, str], program: str, timeout_s: float) -> Walk:
    with socket.socket() as probe:  # the page's port may be taken here
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "VLLM": program, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLEDGE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    log = folder / "printed.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script(shells, port)], cwd=folder, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        status = process.wait(timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # `fledge serve` stops its server
    printed = log.read_text(encoding="utf-8", errors="replace")
    times = [float((folder / f"times-{n}").read_text()) for n in range(1, 99) if (folder / f"times-{n}").is_file()]
    seconds = dict(zip(shells, (after - before for before, after in zip(times, times[1:], strict=False)), strict=False))
    assert status == 0, f"status {status} in step {list(shells)[len(times) - 1]!r}\n{printed[-4000:]}"
    return Walk(folder, printed, seconds)


@pytest.fixture(scope="module")
def walk(vllm_program, tmp_path_factory) -> Walk:
    folder = Path(os.environ.get("FLEDGE_WALK") or tmp_path_factory.mktemp("walk"))
    folder.mkdir(parents=True, exist_ok=True)
    assert not list(folder.iterdir()), f"{folder} is not empty: the walk begins in a clean folder"
    return run(folder, steps(), vllm_program, MINUTES * 60)


def test_the_page_has_every_step():
    assert tuple(steps()) == STEPS


def test_the_steps_and_their_times(walk, capsys):
    with capsys.disabled():
        print("\n" + "\n".join(f"{title:20s} {seconds:7.1f} s" for title, seconds in walk.seconds.items()))
        print(f"{'all':20s} {sum(walk.seconds.values()):7.1f} s")
    assert tuple(walk.seconds) == STEPS and sum(walk.seconds.values()) < MINUTES * 60


def test_answers_are_the_targets(walk):
    manifest = walk.json("answers/manifest.json")
    assert manifest["complete"] and manifest["counts"]["rows"] == ROWS, manifest["counts"]
    assert manifest["counts"]["output_tokens"] > 20 * ROWS
    assert list((walk.folder / "outputs" / "serve").glob("server-*.log")), "no server answered"


def test_states_are_stored(walk):
    store = HiddenStore(walk.folder / "states")
    assert len(store) == ROWS and walk.json("states/manifest.json")["complete"]


@pytest.mark.parametrize("head", ["head-online", "head-offline"])
def test_heads_load_and_have_learned(walk, head):
    target = Target.from_pretrained(str(walk.folder / "target"))
    assert load_draft(walk.folder / head, target.embedding_weight).config.draft_vocab_size == 8192
    assert walk.json(f"{head}/provenance.json")["metrics"]["eval_tau"] > 1.3


def test_online_and_offline_are_the_same_head(walk):
    assert "the same head, bit for bit" in walk.printed
    one, other = (walk.folder / head / "model.safetensors" for head in ("head-online", "head-offline"))
    assert one.read_bytes() == other.read_bytes()


def test_the_bench_is_lossless_and_gains(walk):
    (figures,) = walk.json("bench/summary.json")["sets"].values()
    assert figures["quality"]["compared"] == figures["quality"]["identical"] >= 6
    assert figures["acceptance"]["tau"] > 1.2


def test_the_export_is_the_head_with_its_card(walk):
    with (
        safe_open(walk.folder / "exported" / "model.safetensors", "pt") as exported,
        safe_open(walk.folder / "head-offline" / "model.safetensors", "pt") as trained,
    ):
        assert sorted(exported.keys()) == sorted(trained.keys())
    assert "vllm serve" in (walk.folder / "exported" / "README.md").read_text(encoding="utf-8")


def test_vllm_accepts_its_drafts(walk):
    (figures,) = walk.json("bench-vllm/summary.json")["sets"].values()
    assert figures["acceptance"]["tau"] > 1.2
    counted = dict(re.findall(r"^vllm:(\w+)_total\{.*\} ([\d.e+]+)$", (walk.folder / "accepted.txt").read_text(), re.M))
    assert float(counted["spec_decode_num_accepted_tokens"]) > 0


def test_nothing_listens_any_more(walk):
    """Both servers were stopped by the page's own commands."""
    ports = set(re.findall(r"127\.0\.0\.1:(\d+)", (walk.folder / "serve.log").read_text()))
    assert ports
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0


def test_a_step_that_fails_stops_the_walk_and_its_server(tmp_path):
    """Negative control: the failing step is named, and what it left in the background ends."""
    shells = {"one": "sleep 600 & echo $! >pid\n", "two": "false\n", "three": "touch reached\n"}
    with pytest.raises(AssertionError, match="status 1 in step 'two'"):
        run(tmp_path, shells, "vllm", 30)
    assert not (tmp_path / "reached").exists()
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
