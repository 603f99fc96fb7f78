"""Other programs on the same cores, which a decoding step feels more than any other: it waits at hundreds of barriers.

OpenMP's threads wait for each other awake, which is quickest where each has a core. Where another program uses one of
the cores, the thread there spends its share of the time on waiting, and at the next barrier all wait until it has its
turn again. SmolLM2 in bf16 on two cores of an AMD EPYC (Zen 3), plain tokens per second: 45 with nothing else running,
12 to 17 beside an endless loop, 1 beside another process that decodes with one thread. With threads that wait asleep 24
to 33 and 20 to 30; with nothing else running these give 15 to 30, so it is not the default (dev/log has the table).
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from fledge.console import say

CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them: the user has decided
LOOK_S, AGAIN_S = 0.15, 0.5  # a short look; a longer one where it sees something, which may be over soon
BUSY = 0.5  # of a core
STAT = Path("/proc/stat")
IDLE = (3, 4)  # columns of /proc/stat: idle, waiting for a disk


class Clocks(NamedTuple):
    """Seconds so far: of these cores, all in all and idle, and of this process."""

    total: float
    idle: float
    own: float


def wait_asleep_beside_others() -> None:
    """Let OpenMP's threads wait asleep if other programs use cores that they will need. Before torch is imported, which
    loads OpenMP; says one line. Without Linux's /proc it does nothing."""
    if "torch" in sys.modules or any(name in os.environ for name in CHOSEN):
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = threads_wanted(cores)
    enough = max(BUSY, len(cores) + BUSY - threads)
    if threads < 2 or busy_elsewhere(cores, LOOK_S) <= enough or (others := busy_elsewhere(cores, AGAIN_S)) <= enough:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    say(
        f"other programs keep {others:.1f} of {len(cores)} cores busy: threads wait for each other asleep, else they "
        f"would hold each other up. Slower than on a quiet machine (OMP_WAIT_POLICY=active waits as there)."
    )


def threads_wanted(cores: list[int]) -> int:
    """As many as torch will start: OMP_NUM_THREADS, else one for each core that is not another one's second half."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit():
        return int(given)
    return len({_siblings(core) for core in cores})


def busy_elsewhere(cores: list[int], seconds: float) -> float:
    """How many of these cores others use during so many seconds; 0 where that cannot be seen."""
    before = clocks(cores)
    if before is None:
        return 0.0
    time.sleep(seconds)
    after = clocks(cores)
    if after is None or after.total <= before.total:
        return 0.0
    used = (after.total - before.total) - (after.idle - before.idle) - (after.own - before.own)
    return max(0.0, used * len(cores) / (after.total - before.total))


def clocks(cores: list[int]) -> Clocks | None:
    """From /proc/stat, whose figures are ticks of 10 ms or so; None where there is none."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    rows = {line.split()[0]: [int(word) for word in line.split()[1:9]] for line in lines if line.startswith("cpu")}
    mine = [rows[f"cpu{core}"] for core in cores if f"cpu{core}" in rows]
    total, idle = sum(map(sum, mine)), sum(row[column] for row in mine for column in IDLE)
    return Clocks(total / tick, idle / tick, time.process_time())


def _siblings(core: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)
