"""Beside another program threads wait asleep, and only there; what the user chose is kept."""

import os
import subprocess
import sys
import time

import pytest

from fledge import cores
from fledge.cli import COMMANDS
from fledge.cores import Clocks, busy_elsewhere, threads_wanted, wait_asleep_beside_others

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded torch, two cores, no choice of the user."""
    for name in (*cores.CHOSEN, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(cores, "threads_wanted", lambda mine: 2)
    return monkeypatch


def others(monkeypatch, *busy: float) -> None:
    """What the looks see, one after the other."""
    looks = iter(busy)
    monkeypatch.setattr(cores, "busy_elsewhere", lambda mine, seconds: next(looks))


def test_a_busy_core_lets_threads_sleep(fresh, capsys):
    others(fresh, 0.9, 1.0)
    fresh.setenv("OMP_WAIT_POLICY", "")  # so that what is set is taken back
    fresh.delenv("OMP_WAIT_POLICY")
    wait_asleep_beside_others()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert "other programs keep 1.0 of 2 cores busy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "why", ["quiet", "over soon", "chosen", "spin count", "one thread", "room for all", "torch is there"]
)
def test_everything_else_stays(fresh, capsys, why):
    others(fresh, *{"quiet": (0.3,), "over soon": (0.9, 0.3)}.get(why, (0.9, 0.9)))
    if why == "chosen":
        fresh.setenv("OMP_WAIT_POLICY", "active")
    if why == "spin count":
        fresh.setenv("GOMP_SPINCOUNT", "1000")
    if why == "one thread":
        fresh.setattr(cores, "threads_wanted", lambda mine: 1)
    if why == "room for all":
        fresh.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    if why == "torch is there":
        fresh.setitem(sys.modules, "torch", object())
    wait_asleep_beside_others()
    assert os.environ.get("OMP_WAIT_POLICY") == ("active" if why == "chosen" else None)
    assert capsys.readouterr().err == ""


def test_the_clocks_of_its_own_cores_are_read(monkeypatch, tmp_path):
    """User, nice, system, idle, waiting for a disk, two kinds of interrupts, stolen by other machines, guests."""
    rows = [
        "cpu 9 9 9 9 9 9 9 9 9 9",
        "cpu0 1 2 3 40 5 6 7 8 9 9",
        "cpu1 100 0 0 0 0 0 0 0 0 0",
        "cpu2 0 0 0 60 0 0 0 0 0 0",
    ]
    (tmp_path / "stat").write_text("\n".join([*rows, "intr 7"]))
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    found = cores.clocks([0, 2])
    assert (found.total * TICKS, found.idle * TICKS) == (pytest.approx(132), pytest.approx(105))
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    assert cores.clocks([0, 2]) is None and busy_elsewhere([0, 2], 60) == 0  # without waiting for it


def test_its_own_time_and_idle_cores_do_not_count(monkeypatch):
    readings = iter([Clocks(100.0, 40.0, 7.0), Clocks(102.0, 41.0, 7.9)])
    monkeypatch.setattr(cores, "clocks", lambda mine: next(readings))
    assert busy_elsewhere([0, 1], 0) == pytest.approx(0.1)  # of two seconds of cores one was idle, 0.9 its own


@pytest.mark.skipif(not cores.STAT.exists(), reason="no /proc/stat")
def test_the_system_s_clocks_go_forward():
    """A second of a core is a second, whatever runs: idle and used together."""
    before = cores.clocks([0])
    time.sleep(0.5)
    after = cores.clocks([0])
    assert 0.3 < after.total - before.total < 2 and 0 <= after.idle - before.idle <= after.total - before.total


def test_threads_are_those_of_the_variable_or_of_whole_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_wanted([0, 1]) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cores, "_siblings", lambda core: f"{core % 2},{core % 2 + 2}")
    assert threads_wanted([0, 1, 2, 3]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_compute_look_before_torch_is_there(name):
    """And before flags are read, for which `train` imports it. Others do not look."""
    code = (
        "import sys; from fledge import cli; cli.wait_asleep_beside_others = lambda: print('torch' in sys.modules);"
        "cli.run_command(sys.argv[1], ['--nonsense', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=120)
    assert "nonsense" in done.stderr
    assert done.stdout.split() == (["False"] if COMMANDS[name].computes else [])


@pytest.mark.parametrize("busy", [0.0, 1.0])
def test_openmp_reads_what_was_set(busy):
    code = (
        f"import sys; from fledge import cores; cores.busy_elsewhere = lambda mine, seconds: {busy};"
        "cores.threads_wanted = lambda mine: len(mine) + 1; cores.wait_asleep_beside_others(); import torch"
    )
    plain = {name: value for name, value in os.environ.items() if name not in cores.CHOSEN}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**plain, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in shown.stderr:
        pytest.skip("this build of torch has not GNU's OpenMP")
    assert ("GOMP_SPINCOUNT = '0'" in shown.stderr) == bool(busy)
