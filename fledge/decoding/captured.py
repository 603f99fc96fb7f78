"""Running the parts of a round: as they are, or captured once per bucket into CUDA graphs and replayed.

A capture needs the parts to have run before, on memory of their own; that rehearsal must leave no trace, so the state
and the generator are put back after it. (Caches need no such care: a rehearsal writes only behind the committed rows.)
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from fledge.console import warn
from fledge.decoding.static_round import Round

Lap = Callable[[str], None]
REHEARSALS = 2


def run_parts(round_: Round, bucket: int, lap: Lap) -> None:
    """One round, launch by launch."""
    for name, part in round_.parts(bucket).items():
        part()
        lap(name)


def rehearse(round_: Round, bucket: int) -> None:
    """Run the parts and take back what they did."""
    state = round_.state.copy()
    generator = round_.generator
    draws = generator.get_state() if generator is not None else None
    for _ in range(REHEARSALS):
        run_parts(round_, bucket, lambda name: None)
        round_.state.set(**state)
    if generator is not None and draws is not None:
        generator.set_state(draws)


class Captured:
    """The parts of a round as CUDA graphs, one set per bucket."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._graphs: dict[int, dict[str, Any]] = {}
        self._pool: Any = None
        self.refused = ""  # why the device would not capture this target

    def prepare(self, bucket: int) -> None:
        """Capture this bucket, unless it is or cannot be. The state must hold a generation, if any made-up one."""
        if bucket not in self._graphs and not self.refused:
            self._capture(bucket)

    def run(self, bucket: int, lap: Lap) -> None:
        """One round of a prepared bucket."""
        if self.refused:
            return run_parts(self._round, bucket, lap)
        for name, graph in self._graphs[bucket].items():
            graph.replay()
            lap(name)

    def _capture(self, bucket: int) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            rehearse(self._round, bucket)
        current.wait_stream(stream)
        torch.cuda.synchronize()
        graphs: dict[str, Any] = {}
        try:
            for name, part in self._round.parts(bucket).items():
                graph = torch.cuda.CUDAGraph()
                if self._round.generator is not None:
                    graph.register_generator_state(self._round.generator)
                with torch.cuda.graph(graph, pool=self._pool):
                    part()
                self._pool = graph.pool()
                graphs[name] = graph
        except RuntimeError as error:  # an operation of this model that waits for the device
            self.refused = str(error).strip().splitlines()[0]
            warn(f"{self._round.target.name}: not captured ({self.refused}); rounds run launch by launch.")
            return
        self._graphs[bucket] = graphs


class Stopwatch:
    """Seconds of a round's parts: the host's clock on a CPU, events on a device, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def lap(self, name: str) -> None:
        """The part `name` ended here; the first call of a round begins it."""
        mark: Any = time.perf_counter()
        if self._on_device:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((name, mark))

    def seconds(self) -> dict[str, float]:
        """By part, once the round is over."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._on_device:
            return {name: before.elapsed_time(after) / 1e3 for (_, before), (name, after) in pairs}
        return {name: after - before for (_, before), (name, after) in pairs}
