"""Beside another program threads wait asleep, and only there; what the user chose is kept."""

import os
import subprocess
import sys

import pytest

from fledge import cores
from fledge.cores import Clocks, busy_elsewhere, threads_wanted, wait_asleep_beside_others

SPIN = "while True: pass"
HERE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded torch, two cores, no choice of the user."""
    for name in (*cores.CHOSEN, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(cores, "threads_wanted", lambda mine: 2)
    return monkeypatch


def others(monkeypatch, busy: float | None) -> None:
    monkeypatch.setattr(cores, "busy_elsewhere", lambda mine: busy)


def test_a_busy_core_lets_threads_sleep(fresh, capsys):
    others(fresh, 0.9)
    fresh.setenv("OMP_WAIT_POLICY", "")  # so that what is set is taken back
    fresh.delenv("OMP_WAIT_POLICY")
    wait_asleep_beside_others()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    told = capsys.readouterr()
    assert "other programs keep 0.9 of 2 cores busy" in told.out + told.err


@pytest.mark.parametrize(
    "why", ["quiet", "chosen", "spin count", "one thread", "room for all", "torch is there", "no /proc"]
)
def test_everything_else_stays(fresh, capsys, why):
    others(fresh, {"quiet": 0.3, "no /proc": None}.get(why, 0.9))
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
    told = capsys.readouterr()
    assert told.out + told.err == ""


@pytest.mark.skipif(cores.clocks(HERE) is None, reason="no /proc/stat")
def test_a_process_that_computes_is_seen():
    """Its own time aside: this one computes as well."""
    other = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        seen = max(busy_elsewhere(HERE, 0.5) for _ in range(3))
    finally:
        other.kill()
        other.wait()
    assert seen > cores.BUSY


def test_its_own_time_and_idle_cores_do_not_count(monkeypatch):
    readings = iter([Clocks(100.0, 40.0, 7.0), Clocks(102.0, 41.0, 7.9)])
    monkeypatch.setattr(cores, "clocks", lambda mine: next(readings))
    assert busy_elsewhere([0, 1], 0) == pytest.approx(0.1)  # of two seconds of cores one was idle, 0.9 its own


def test_threads_are_those_of_the_variable_or_of_whole_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_wanted([0, 1]) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cores, "_siblings", lambda core: f"{core % 2},{core % 2 + 2}")
    assert threads_wanted([0, 1, 2, 3]) == 2


def test_a_command_sets_it_before_torch_is_there():
    """In the order of a real start: OpenMP reads the variable when torch is imported."""
    code = (
        "import sys; from fledge import cores; from fledge.cli import run_command;"
        "cores.wait_asleep_beside_others.__code__ = (lambda: print('looked', 'torch' in sys.modules)).__code__;"
        "cores.sys = sys; run_command('decode', ['--nonsense', '1']); run_command('plan', ['--nonsense', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:-1] == ["looked False"], done.stderr
