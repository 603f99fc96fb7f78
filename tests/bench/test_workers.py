"""A benchmark over several workers: every question once, that of a worker that died too. More in test_workers.py."""

import json
import sys

import pytest

from fledge.bench.rows import read_rows

ray = pytest.importorskip("ray")


@pytest.fixture
def travelling(fake_engine, monkeypatch):
    """The fake engine, with a small Ray to which the helpers of this folder travel by value."""
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[fake_engine.__module__])
    yield fake_engine
    ray.shutdown()


def test_workers_share_the_questions(make_args, fake_run, travelling, tmp_path, capsys):
    engine = travelling(die_on="lighthouse", marker=str(tmp_path / "died"))
    folder = fake_run(make_args(question_end=7, num_gpus_total=0, num_workers=2), engine, num_workers=2)
    assert (tmp_path / "died").exists() and "a worker died on quick question quick-01" in capsys.readouterr().err
    rows = read_rows(folder / "results.jsonl")
    assert sorted(row["question_id"] for row in rows) == [f"quick-{n:02d}" for n in range(7)]
    assert json.loads((folder / "summary.json").read_text())["sets"]["quick"]["questions"] == 7
