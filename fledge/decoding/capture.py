"""Running the parts of a round: as they are, or captured once per bucket into CUDA graphs and replayed.

A capture needs the parts to have run before, on memory of their own. That rehearsal must leave no trace, so the state
is put back after it. Caches need no such care: a rehearsal writes only behind the committed rows. Draws need none
either, they are functions of seeds and positions.
"""

import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fledge.console import warn
from fledge.decoding.round import Part, Round, Shapes

Lap = Callable[[str], None]
REHEARSALS = 2


def run_parts(round_: Round, shapes: Shapes, lap: Lap) -> None:
    """One round, launch by launch."""
    for name, part in round_.parts(shapes).items():
        part()
        lap(name)


def rehearse(round_: Round, bucket: int) -> None:
    """Run the parts and take back what they did."""
    state = round_.state.copy()
    for _ in range(REHEARSALS):
        run_parts(round_, Shapes(bucket), lambda name: None)
        round_.state.set(**state)


class Captured:
    """The parts of a round as CUDA graphs, one set per bucket."""

    def __init__(self, round_: Round, name: str) -> None:
        self._round, self._name = round_, name
        self._graphs: dict[int, dict[str, Any]] = {}
        self._pool: Any = None
        self.refused = ""  # why the device would not capture this target

    def prepare(self, bucket: int) -> None:
        """Capture this bucket, unless it is or cannot be. The state must hold sequences, if any made-up ones."""
        if bucket not in self._graphs and not self.refused:
            self._capture(bucket)

    def run(self, bucket: int, lap: Lap) -> None:
        """One round of a prepared bucket."""
        if self.refused:
            return run_parts(self._round, Shapes(bucket), lap)
        for name, graph in self._graphs[bucket].items():
            graph.replay()
            lap(name)

    def _capture(self, bucket: int) -> None:
        try:
            graphs = graphs_of(self._round.parts(Shapes(bucket)), lambda: rehearse(self._round, bucket), self._pool)
        except RuntimeError as error:  # an operation of this model that waits for the device
            self.refused = f"{str(error).strip().splitlines()[0]} at {place_of(error)}"
            warn(f"{self._name}: not captured ({self.refused}); rounds run launch by launch.")
            return
        self._graphs[bucket] = graphs
        self._pool = next(reversed(graphs.values())).pool()


def graphs_of(parts: Mapping[str, Part], rehearsal: Callable[[], Any], pool: Any = None) -> dict[str, Any]:
    """CUDA graphs of these parts. Rehearsed and captured on a stream of our own; an operation that waits for the device
    is found in the rehearsal by torch's sync debug mode, so that a capture is hardly ever begun that has to be
    abandoned half way. It raises RuntimeError."""
    stream = capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    graphs: dict[str, Any] = {}
    try:
        with torch.cuda.stream(stream):
            rehearsal()
            with waiting_is_an_error():
                rehearsal()
            with generator_kept():
                for name, part in parts.items():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        part()
                    pool = graph.pool()
                    graphs[name] = graph
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    return graphs


def as_captured(call: Part, device: torch.device) -> Part:
    """The call as rounds of fixed shapes run it: a captured graph, on a device that captures it."""
    if device.type != "cuda":
        return call
    try:
        return graphs_of({"call": call}, call)["call"].replay
    except RuntimeError:
        return call


def place_of(error: BaseException) -> str:
    """File and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


@functools.cache
def capture_stream(device: int) -> Any:
    """The stream of a device's rehearsals and captures: memory cached for one stream is of no use to another."""
    return torch.cuda.Stream(device)


@contextmanager
def generator_kept() -> Iterator[None]:
    """A capture that fails leaves the device's random numbers in capture mode, where the next draw outside a graph is
    refused. Then the generator gets a state of its own again, with the numbers it had."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.get_state()
    try:
        yield
    except RuntimeError:
        fresh = torch.Generator(generator.device)
        fresh.set_state(before)
        generator.graphsafe_set_state(fresh)
        raise


class waiting_is_an_error:
    """A context in which an operation that waits for the device raises RuntimeError."""

    def __enter__(self) -> None:
        self._before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode(self._before)


class Timer:
    """Seconds of a round's parts: the host's clock on a CPU, events on a device, for which no lap waits."""

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
        """By part; a device is waited for unless it has come past the last mark."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._on_device:
            self._marks[-1][1].synchronize()
            return {name: before.elapsed_time(after) / 1e3 for (_, before), (name, after) in pairs}
        return {name: after - before for (_, before), (name, after) in pairs}
