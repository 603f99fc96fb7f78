"""Jobs spread over workers through Ray, on CPU: every job once, whatever happens to the workers.

The jobs are small functions that travel by value, so a worker starts in a second; tests/bench has one run of a
benchmark.
"""

import sys
from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.workers import run_jobs

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One small Ray for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_register_timeout_seconds", "300")
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80_000_000)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield
        ray.shutdown()


def process() -> int:
    """An engine: the worker's process, which says who did a job."""
    import os

    return os.getpid()


def times_ten(engine: int, job: int) -> tuple[int, int]:
    return engine, job * 10


def done_by(jobs: list, work=times_ten, load=process, **options) -> dict:
    """Job -> (its worker, its result)."""
    found = list(run_jobs(load, work, jobs, num_workers=2, gpus_per_worker=0, **options))
    assert sorted(job for job, _ in found) == sorted(jobs), "every job once"
    return dict(found)


def dying(marker: Path, always: bool = False):
    """Work that kills its worker at job 3: at the first attempt, or at every one."""

    def work(engine: int, job: int) -> tuple[int, int]:
        import os

        if job == 3 and (always or not marker.exists()):
            marker.touch()
            os._exit(1)
        return engine, job * 10

    return work


def test_workers_share_the_jobs():
    found = done_by(list(range(40)))
    assert all(result == job * 10 for job, (_, result) in found.items())
    assert len({worker for worker, _ in found.values()}) == 2


def test_fewer_jobs_than_workers():
    assert len(done_by([5])) == 1


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(tmp_path, capsys):
    found = done_by(list(range(6)), dying(tmp_path / "died"), describe=lambda job: f"question {job}")
    assert found[3][1] == 30 and (tmp_path / "died").exists()
    assert "a worker died on question 3" in capsys.readouterr().err


def test_a_job_that_keeps_killing_workers_stops_the_run_and_keeps_the_rest(tmp_path):
    kept = []
    with pytest.raises(UserError, match="question 3: 2 workers died on it.*What was finished is kept"):
        for job, _ in run_jobs(
            process, dying(tmp_path / "died", always=True), list(range(6)), num_workers=2, gpus_per_worker=0,
            describe=lambda job: f"question {job}",
        ):  # fmt: skip
            kept.append(job)
    assert kept and 3 not in kept


def test_errors_of_users_arrive_as_they_were_raised():
    def refuse() -> None:
        raise UserError("no such head")

    with pytest.raises(UserError, match="^no such head$"):
        done_by([1, 2], load=refuse)


def test_other_errors_keep_the_worker_s_traceback():
    def wrong(engine: int, job: int) -> None:
        raise KeyError("lighthouse")

    with pytest.raises(ray.exceptions.RayTaskError, match="(?s)in wrong.*lighthouse"):
        done_by([1, 2], wrong)


def test_more_gpus_than_the_cluster_has_are_refused():
    with pytest.raises(UserError, match="Ray sees 0"):
        list(run_jobs(process, times_ten, [1], num_workers=2, gpus_per_worker=2))


def test_without_ray_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        list(run_jobs(process, times_ten, [1], num_workers=2, gpus_per_worker=0))
