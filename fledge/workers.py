"""Spread jobs over worker processes with Ray: one worker per GPU group, or several on CPU.

Every worker loads its own engine and asks for the next job when it has finished one, so more jobs than workers, or
fewer, both work. A worker that dies is replaced and its job is run again; a job that keeps killing workers stops the
run. The only file that imports Ray; knows jobs and results, not what they are.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fledge.console import warn
from fledge.errors import UserError

START_TIMEOUT_S = "300"  # Ray's own 60 s is too short where many workers start on busy cores
MAX_DEATHS_PER_JOB = 2  # a job that killed two workers will kill the third


def run_jobs(
    load: Callable[[], Any],
    work: Callable[[Any, Any], Any],
    jobs: Sequence[Any],
    *,
    num_workers: int,
    gpus_per_worker: float,
    describe: Callable[[Any], str] = str,
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, work(engine, job)) in the order they finish. `load` makes a worker's engine, in the worker. Workers
    share a GPU where each has a part of it (`gpus_per_worker` 0.5)."""
    ray = _ray()
    started_here = not ray.is_initialized()
    if started_here:
        os.environ.setdefault("RAY_worker_register_timeout_seconds", START_TIMEOUT_S)
        cpus = max(num_workers, os.cpu_count() or 1)
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False, **(
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": cpus}
        ))  # fmt: skip
    try:
        _check_gpus(ray, num_workers * gpus_per_worker)
        yield from _pool(ray, load, work, jobs, min(num_workers, len(jobs)), gpus_per_worker, describe)
    finally:
        if started_here:
            ray.shutdown()


def _pool(
    ray: Any,
    load: Callable[[], Any],
    work: Callable[[Any, Any], Any],
    jobs: Sequence[Any],
    num_workers: int,
    gpus_per_worker: float,
    describe: Callable[[Any], str],
) -> Iterator[tuple[Any, Any]]:
    worker_class = ray.remote(num_cpus=1, num_gpus=gpus_per_worker)(_Worker)
    waiting, deaths = deque(enumerate(jobs)), dict.fromkeys(range(len(jobs)), 0)
    running: dict[Any, tuple[Any, int, Any]] = {}  # the call's reference -> worker, job number, job
    workers: list[Any] = []

    def start() -> Any:
        workers.append(worker_class.remote(load, work))
        return workers[-1]

    def give(worker: Any) -> None:
        if waiting:
            number, job = waiting.popleft()
            running[worker.run.remote(job)] = worker, number, job

    try:
        for _ in range(num_workers):
            give(start())
        yield from _collect(ray, running, waiting, deaths, start, give, describe)
    finally:
        for worker in workers:  # an error's traceback would keep them, and their GPUs, alive
            ray.kill(worker)


def _collect(
    ray: Any,
    running: dict[Any, tuple[Any, int, Any]],
    waiting: deque[tuple[int, Any]],
    deaths: dict[int, int],
    start: Callable[[], Any],
    give: Callable[[Any], None],
    describe: Callable[[Any], str],
) -> Iterator[tuple[Any, Any]]:
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        worker, number, job = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayActorError as error:
            deaths[number] += 1
            if deaths[number] >= MAX_DEATHS_PER_JOB:
                raise UserError(
                    f"{describe(job)}: {deaths[number]} workers died on it ({_first_line(error)}). Often memory: try "
                    f"fewer workers or shorter sequences. What was finished is kept."
                ) from None
            warn(f"a worker died on {describe(job)} ({_first_line(error)}); starting another and asking again.")
            waiting.appendleft((number, job))
            give(start())
            continue
        except ray.exceptions.RayTaskError as error:
            raise _original(error) from None
        yield job, result
        give(worker)


class _Worker:
    """Runs in its own process."""

    def __init__(self, load: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        self._load, self._work, self._engine = load, work, None

    def run(self, job: Any) -> Any:
        if self._engine is None:  # here, not in __init__: an error of loading then reaches the caller as itself
            self._engine = self._load()
        return self._work(self._engine, job)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "several workers need Ray, which is not installed. Install it with `pip install ray`, or use one "
            "worker: `bench` with --num-gpus-total equal to --num-gpus-per-model, `extract` with --num-workers 1."
        ) from None
    return ray


def _check_gpus(ray: Any, wanted: float) -> None:
    found = int(ray.cluster_resources().get("GPU", 0))
    if wanted > found:
        raise UserError(
            f"{wanted:g} GPUs wanted by all workers, Ray sees {found}. Ask for fewer workers, or join more nodes."
        )


def _original(error: Any) -> BaseException:
    """A user's error as it was raised in the worker; anything else keeps the worker's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
