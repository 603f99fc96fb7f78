"""Several workers through Ray, on CPU: every question once, whatever happens to the workers."""

import json
import sys

import pytest

from fledge.bench.rows import read_rows
from fledge.errors import UserError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One small Ray for the module; the helpers of this folder travel by value."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80_000_000)
    yield
    ray.shutdown()
    monkeypatch.undo()


@pytest.fixture
def travelling(fake_engine):
    ray.cloudpickle.register_pickle_by_value(sys.modules[fake_engine.__module__])
    return fake_engine


def test_workers_share_the_questions(make_args, fake_run, travelling):
    folder = fake_run(make_args(question_end=7, num_gpus_total=0, num_workers=2), travelling(), num_workers=2)
    rows = read_rows(folder / "results.jsonl")
    assert sorted(row["question_id"] for row in rows) == [f"quick-{n:02d}" for n in range(7)]
    assert json.loads((folder / "summary.json").read_text())["sets"]["quick"]["questions"] == 7


def test_fewer_questions_than_workers(make_args, fake_run, travelling):
    folder = fake_run(make_args(question_end=1), travelling(), num_workers=2)
    assert len(read_rows(folder / "results.jsonl")) == 1


def test_a_worker_that_dies_is_replaced_and_its_question_asked_again(make_args, fake_run, travelling, tmp_path, capsys):
    engine = travelling(die_on="lighthouse", marker=str(tmp_path / "died"))
    folder = fake_run(make_args(question_end=4), engine, num_workers=2)
    assert (tmp_path / "died").exists() and "a worker died on quick question quick-01" in capsys.readouterr().err
    assert len(read_rows(folder / "results.jsonl")) == 4


def test_a_question_that_keeps_killing_workers_stops_the_run_and_keeps_the_rest(make_args, fake_run, travelling):
    engine = travelling(die_on="lighthouse", always_die=True)
    args = make_args(question_end=4)
    with pytest.raises(UserError, match="quick-01: 2 workers died on it"):
        fake_run(args, engine, num_workers=2)
    assert "quick-01" not in {row["question_id"] for row in read_rows(args.output_dir / "results.jsonl")}


def test_errors_of_users_arrive_as_they_were_raised(make_args, fake_run, travelling):
    engine = travelling(mode="refuse")
    with pytest.raises(UserError, match="no such head"):
        fake_run(make_args(question_end=2), engine, num_workers=2)


def test_more_gpus_than_the_cluster_has_are_refused():
    from fledge.workers import run_jobs

    with pytest.raises(UserError, match="Ray sees 0"):
        list(run_jobs(lambda: None, lambda engine, job: job, [1], num_workers=2, gpus_per_worker=2))


def test_without_ray_the_error_says_what_to_do(monkeypatch):
    from fledge.workers import run_jobs

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        list(run_jobs(lambda: None, lambda engine, job: job, [1], num_workers=2, gpus_per_worker=0))
