"""Rows survive crashes and never meet rows of other settings."""

import json
from pathlib import Path

import pytest

import fledge
from fledge.bench.rows import fingerprint, folder_fingerprint, measured_files, open_results, read_rows
from fledge.errors import UserError


def row(question, **more):
    return {"dataset": "d", "question_id": str(question), "question_sha": "x", "repeat": 0, **more}


def test_rows_are_there_after_reopening(tmp_path):
    with open_results(tmp_path, {"a": 1}) as results:
        results.append(row(1, value=3))
    with open_results(tmp_path, {"a": 1}) as results:
        assert len(results) == 1 and results.rows[0]["value"] == 3
        assert ("d", "1", "x", "0", "", "") in results


def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path):
    """A crash in the middle of a write leaves half a line; the next run must not choke on it, nor append to it."""
    path = tmp_path / "results.jsonl"
    with open_results(tmp_path, {}) as results:
        results.append(row(1))
        results.append(row(2))
    path.write_bytes(path.read_bytes()[:-20])
    with open_results(tmp_path, {}) as results:
        assert [one["question_id"] for one in results.rows] == ["1"]
        results.append(row(2))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == ["1", "2"]


def test_a_fingerprint_names_no_path_and_rows_can_be_written_back(tmp_path):
    """A fingerprint becomes part of a file's name: `/../x` was a traceback, as was half of a surrogate pair."""
    path = tmp_path / "results.jsonl"
    with open_results(tmp_path, {}) as results:
        results.append(row(1))
    sound = path.read_text()
    for line in ('{"dataset": "d", "fingerprint": "/../x"}', '{"dataset": "d", "fingerprint": [1]}',
                 '{"dataset": "\\ud800"}'):  # fmt: skip
        path.write_text(sound + line + "\n")
        with open_results(tmp_path, {}) as results:
            assert [one["question_id"] for one in results.rows] == ["1"]
        assert path.read_text() == sound
    path.write_text(sound + '{"dataset": "d", "fingerprint": "0123456789ab"}\n')
    with open_results(tmp_path, {}):
        assert (tmp_path / "results-0123456789ab.jsonl").is_file()  # control: a row of other settings is kept


def test_the_drafters_count_as_measured_code():
    """Their folder was renamed once, and rows of other code were taken for rows of this one."""
    root = Path(fledge.__file__).parent
    names = {str(path.relative_to(root)) for path in measured_files(root)}
    assert {"drafters/eagle3/propose.py", "decoding/generate.py", "target/model.py", "bench/measure.py"} <= names
    assert all((root / name).is_file() for name in names) and "bench/report.py" not in names


def test_rows_of_other_settings_are_set_aside_and_come_back(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_results(tmp_path, {"depth": 5}) as results:
        results.append(row(1, value="deep"))
    with open_results(tmp_path, {"depth": 3}) as results:
        assert len(results) == 0
        results.append(row(1, value="shallow"))
    assert [one["value"] for one in read_rows(path)] == ["shallow"]
    with open_results(tmp_path, {"depth": 5}) as results:
        assert [one["value"] for one in results.rows] == ["deep"]
    assert len(list(tmp_path.glob("results-*.jsonl"))) == 1


def test_two_benchmarks_cannot_write_one_folder(tmp_path):
    with open_results(tmp_path, {}), pytest.raises(UserError, match="another run"), open_results(tmp_path, {}):
        pass


def test_every_line_is_on_disk_before_append_returns(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_results(tmp_path, {}) as results:
        results.append(row(1))
        assert len(read_rows(path)) == 1


def test_a_row_cannot_be_measured_twice(tmp_path):
    with open_results(tmp_path, {}) as results:
        results.append(row(1))
        with pytest.raises(AssertionError, match="measured twice"):
            results.append(row(1))


def test_fingerprints_see_every_setting_and_retrained_heads(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    head = tmp_path / "head"
    head.mkdir()
    (head / "model.safetensors").write_bytes(b"old")
    before = folder_fingerprint(str(head))
    (head / "model.safetensors").write_bytes(b"new")
    assert folder_fingerprint(str(head)) != before


def test_a_folder_under_another_path_is_the_same_and_another_folder_is_not(tmp_path, monkeypatch):
    """A rerun with a relative path measured everything again."""
    for name in ("head", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    monkeypatch.chdir(tmp_path)

    def of(path: str) -> str:
        return fingerprint({"head": path, "head_files": folder_fingerprint(path)})

    assert of("head") == of(str(tmp_path / "head")) == of("other/../head") != of("other")
    assert of("org/head") != of("org/other")  # names of the hub
    assert fingerprint({"head": "head"}) != fingerprint({"head": "other"})  # a server's, whose files are elsewhere
