"""Labelled cases, what becomes of each, and the counts.

A case knows whether its input is valid: an invalid one is a good input that one named rule has changed. So an input
that is accepted though it is wrong shows as clearly as a traceback. Knows nothing of what fledge reads.

    Case("recipes", "unknown key", act)     # act(folder) reads it in an empty folder and raises what the reader raises
    Case("recipes", None, act)              # valid: act also compares what was read, and raises WrongValue
"""

import contextlib
import faulthandler
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from fledge.data.rejects import Reject
from fledge.errors import UserError

Outcome = Literal[
    "accepted", "refused", "accepted though wrong", "refused though right", "wrong value", "traceback", "hang", "memory"
]
GOOD: tuple[Outcome, ...] = ("accepted", "refused")
BAD: tuple[Outcome, ...] = (
    "accepted though wrong", "refused though right", "wrong value", "traceback", "hang", "memory",
)  # fmt: skip
LIMIT_S = 10.0
LIMIT_BYTES = 1 << 30  # that a case may add to the process


class WrongValue(Exception):
    """Read without an error, but not what was written."""


class Reached(BaseException):
    """Raised in place of loading something heavy: everything that comes before it has accepted the input.

    No `Exception`, so that no `except` on the way takes it for a fault of the input.
    """


class TimedOut(BaseException):
    """The case ran past its limit."""


@dataclass(frozen=True)
class Case:
    """One input. `rule` says how a good input was changed; None: it is valid."""

    area: str
    rule: str | None
    act: Callable[[Path], object]
    shown: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Fault:
    """A case that ended badly."""

    area: str
    rule: str
    outcome: Outcome
    detail: str
    shown: str

    def line(self) -> str:
        return f"[{self.area}] {self.rule}: {self.outcome}: {self.detail[:300]}  <- {self.shown[:300]}"


def judge(case: Case, folder: Path, limit_s: float = LIMIT_S) -> Verdict:
    """Run one case in an empty folder."""
    limit_s *= busyness()
    forget_peak()
    before, shown = memory_bytes("VmRSS"), io.StringIO()
    try:
        with (time_limit(limit_s), memory_limit(), working_in(folder), redirect_stdout(shown),
              redirect_stderr(shown)):  # fmt: skip
            case.act(folder)
        found = Verdict("accepted")
    except TimedOut:
        found = Verdict("hang", f"still running after {limit_s:.0f} s")
    except Reached:
        found = Verdict("accepted")
    except WrongValue as error:
        found = Verdict("wrong value", str(error))
    except (UserError, Reject, OSError) as error:  # what `fledge.cli` shows as one line
        found = Verdict("refused", str(error)) if str(error).strip() else Verdict("traceback", repr(error))
    except SystemExit as error:
        found = Verdict("refused" if error.code in (1, 2) else "accepted", f"exit status {error.code}")
    except MemoryError:
        found = Verdict("memory", "more than there is")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        found = Verdict("traceback", f"{type(error).__name__}: {str(error)[:160]} ({place})")
    if (added := memory_bytes("VmHWM") - before) > LIMIT_BYTES:
        return Verdict("memory", f"{added >> 20} MiB more than before")
    if case.rule is None and found.outcome == "refused":
        return Verdict("refused though right", found.detail)
    if case.rule is not None and found.outcome in ("accepted", "wrong value"):
        return Verdict("accepted though wrong", found.detail)
    return found


@dataclass
class Tally:
    """Counts by area and outcome, and the first fault of every kind."""

    counts: Counter[tuple[str, bool, Outcome]] = field(default_factory=Counter)
    faults: dict[tuple[str, str, Outcome], Fault] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)
    peak: int = 0

    def record(self, case: Case) -> Verdict:
        """Run a case in a folder of its own and count it."""
        folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-"))
        start = time.perf_counter()
        try:
            verdict = judge(case, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.seconds[case.area] += time.perf_counter() - start
        self.peak = max(self.peak, memory_bytes("VmHWM"))
        self.counts[case.area, case.rule is None, verdict.outcome] += 1
        if verdict.outcome not in GOOD:
            key = (case.area, case.rule or "valid", verdict.outcome)
            self.faults.setdefault(key, Fault(*key, verdict.detail, case.shown))
        return verdict

    def count(self, area: str | None, outcome: Outcome, valid: bool | None = None) -> int:
        return sum(
            number for (its, good, what), number in self.counts.items()
            if area in (None, its) and what == outcome and valid in (None, good)
        )  # fmt: skip

    @property
    def areas(self) -> list[str]:
        return sorted({area for area, _, _ in self.counts})


def run_cases(cases: SearchStrategy[Case], number: int, tally: Tally, *, chosen_seed: int | None = None) -> None:
    """Draw `number` cases and count them all: the same ones every time, or those of a seed."""

    @settings(
        max_examples=number, derandomize=chosen_seed is None, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def each(case: Case) -> None:
        tally.record(case)

    (each if chosen_seed is None else seed(chosen_seed)(each))()


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise TimedOut in the main thread; a timer that was already running goes on afterwards.

    A call that blocks while it holds the interpreter cannot be interrupted: then all stacks are shown and the process
    ends, long before anybody would wonder.
    """

    def stop(*_: object) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, limit_s)
    start = time.monotonic()
    faulthandler.dump_traceback_later(3 * limit_s, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.1))


def busyness() -> float:
    """Processes that want to run for each core, at least 1: a case takes so much longer than it would alone."""
    return max(os.getloadavg()[0] / len(os.sched_getaffinity(0)), 1.0)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make `folder` the current one, so that relative outputs land there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """A MemoryError instead of the machine's memory; libraries reserve more than they use, hence the margin."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes("VmData") + 3 * LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def forget_peak() -> None:
    """Let the kernel count the peak of this process anew (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(name: Literal["VmHWM", "VmRSS", "VmData"]) -> int:
    """Memory of this process: the most since `forget_peak`, or now; 0 where the system does not say (Linux does)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0
