"""What the sections of on_gpu.py share: the device, its clock and ceilings, and the table of sections.

A figure is a value with the ceiling that the card's memory or matrix units set (measured here, not taken from a data
sheet), the share of it that is reached, the goal, and the best published peer where there is one. Goals and peers are
for one H100 and Qwen3-8B shapes; a rehearsal prints them all the same.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import decode_shapes
import torch

from fledge.decoding.capture import Timer
from fledge.decoding.generate import drop_sessions
from fledge.drafters.eagle3.model import DraftModel
from fledge.target.model import Target

TESTS = Path(__file__).resolve().parents[1] / "tests"
KERNELS = 40  # shown of a profile


class LeftOut(Exception):
    """Why a section does not apply here."""


@dataclass
class Bench:
    """The device, and what several sections share."""

    device: torch.device
    small: bool
    target: Path | None = None
    draft: Path | None = None
    _pair: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        return cls(torch.device(args.device), args.small, args.target, args.draft)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any], repeats: int = 20) -> float:
        """Milliseconds of a call among calls in a row, by the device's own clock."""
        repeats = 2 if self.small else repeats
        for _ in range(1 if self.small else 3):
            call()
        self.wait()
        timer = Timer(self.device)
        timer.lap("begin")
        for _ in range(repeats):
            call()
        timer.lap("calls")
        self.wait()
        return timer.seconds()["calls"] / repeats * 1e3

    @cached_property
    def bytes_per_s(self) -> float:
        """Of a copy, read and written."""
        size = 1 << (20 if self.small else 30)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        goal = torch.empty_like(source)
        return 2 * size / self.ms(lambda: goal.copy_(source), 10) * 1e3

    @cached_property
    def flops(self) -> float:
        """Of a product of large bf16 matrices."""
        size = 128 if self.small else 8192
        matrix = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.ms(lambda: matrix @ matrix, 5) * 1e3

    def pair(self) -> tuple[Target, DraftModel]:
        """A target and a head with random weights."""
        if not self._pair:
            if self.small:
                tiny = tiny_module()
                self._pair = [tiny.tiny_target("qwen3"), tiny.tiny_draft(tiny.tiny_target("qwen3"))]
            else:
                options = argparse.Namespace(shape="qwen3-8b", device=str(self.device), dtype="bfloat16", layers=None)
                self._pair = list(decode_shapes.random_pair(options))
        return self._pair[0], self._pair[1]

    def drop_pair(self) -> None:
        """Make room."""
        if self._pair:
            drop_sessions(self._pair[0])
            self._pair.clear()


@dataclass(frozen=True)
class Section:
    """A part that can be asked for by name."""

    budget_s: int
    what: str
    run: Callable[[Bench], dict[str, Any]]


SECTIONS: dict[str, Section] = {}


Function = Callable[[Bench], dict[str, Any]]


def section(budget_s: int) -> Callable[[Function], Function]:
    """Put a function into the table, in the order of the file."""

    def put(function: Function) -> Function:
        SECTIONS[function.__name__] = Section(budget_s, (function.__doc__ or "").splitlines()[0], function)
        return function

    return put


def figure(value: float, ceiling: float, unit: str, *, goal: float | None = None, peer: str | None = None) -> dict:
    """A value and what it is compared with. A ceiling of time is below the value, one of speed above it."""
    share = ceiling / value if unit in ("ms", "s") else value / ceiling
    rounded = {"value": round(value, 3), "unit": unit, "ceiling": round(ceiling, 3), "share": round(share, 3)}
    return rounded | {key: one for key, one in (("goal", goal), ("peer", peer)) if one is not None}


def tiny_module() -> Any:
    """The tests' table of tiny targets."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import tiny

    return tiny


def kernels(bench: Bench, call: Callable[[], Any], per: str = "") -> dict[str, Any]:
    """The device's kernels of a call by name: [microseconds, launches], the slowest first. `per` forwards of a model,
    or the whole call."""
    if not bench.small:
        call()
    bench.wait()
    activity = torch.profiler.ProfilerActivity.CUDA if bench.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        made = call()
        bench.wait()
    number = made[per] if per else 1
    found: dict[str, list[float]] = {}
    for event in trace.key_averages():
        us = event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
        found[event.key[:110]] = [round(us / number, 2), round(event.count / number, 2)]
    ranked = dict(sorted(found.items(), key=lambda one: -one[1][0])[:KERNELS])
    return {
        "us": round(sum(us for us, _ in found.values()), 1),
        "launches": sum(n for _, n in found.values()),
        "kernels": ranked,
    }


def graph_ms(bench: Bench, call: Callable[[], Any]) -> float:
    """Milliseconds of a call that is captured and replayed."""
    if not bench.on_gpu:
        return bench.ms(call)
    call()
    bench.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return bench.ms(graph.replay)
