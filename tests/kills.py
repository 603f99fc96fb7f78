"""Processes that are killed: forks (imports are paid once), killed with SIGKILL at random moments.

FLEDGE_KILLS says how often; `make kills` sets it to 25.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

KILLS = int(os.environ.get("FLEDGE_KILLS", "4"))


def start(work: Callable[[], object]) -> int:
    """A forked process that does the work, quietly. Returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        if not os.environ.get("FLEDGE_TRACEBACK"):
            os.dup2(null, sys.stderr.fileno())
        result = work()
        os._exit(result if isinstance(result, int) else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(work: Callable[[], object]) -> int:
    """Do the work in a fork; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start(work), 0)[1])


def kill_again_and_again(
    work: Callable[[], object], *, longest_s: float, kills: int = KILLS, folder: Path | None = None
) -> int:
    """Start the work and kill it after a random time, until so many were killed; a run that ended is not counted.

    A `folder` in which a run ended is put aside, so that the next one has something to do. Returns how many were killed
    (fewer when too many ended). `longest_s` is what an undisturbed run takes.
    """
    moments, killed = random.Random(0), 0
    for attempt in range(4 * kills):
        child = start(work)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        if killed == kills:
            break
        if not os.WIFSIGNALED(status):
            assert status == 0, "a run failed"
            if folder is not None:
                os.rename(folder, folder.with_name(f"{folder.name}-{attempt}"))
    return killed


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
