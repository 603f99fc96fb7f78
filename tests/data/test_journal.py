"""Shards that hold every row once: what is on disk after crashes, torn lines, other settings and second tries."""

import errno
import json
from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.regeneration import journal as module
from fledge.regeneration.journal import Journal


def journal(folder: Path, total: int = 10, shard_size: int = 4, **settings) -> Journal:
    return Journal(
        folder, total=total, shard_size=shard_size, settings=settings, tally=lambda row: {"length": row["n"]}
    )


def row(index: int) -> dict:
    return {"id": f"row-{index}", "n": index, "text": "ä\n\t"}


def ids(folder: Path) -> dict[str, list[str]]:
    return {
        path.name: [json.loads(line)["id"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("shard-*.jsonl"))
    }


def test_shards_are_in_input_order_whatever_order_rows_finish_in(tmp_path):
    with journal(tmp_path) as out:
        for index in (9, 3, 1, 8, 0, 7, 2, 6, 4, 5):
            out.add(index, row(index))
        assert out.complete
    assert ids(tmp_path) == {
        "shard-00000.jsonl": ["row-0", "row-1", "row-2", "row-3"],
        "shard-00001.jsonl": ["row-4", "row-5", "row-6", "row-7"],
        "shard-00002.jsonl": ["row-8", "row-9"],
    }
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["complete"] and manifest["counts"] == {"length": 45, "rows": 10}
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert not list((tmp_path / ".journal").glob("*.partial"))


def test_a_shard_appears_only_when_it_is_full(tmp_path):
    with journal(tmp_path) as out:
        for index in (0, 1, 2):
            out.add(index, row(index))
    assert ids(tmp_path) == {}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert not manifest["complete"] and manifest["counts"]["rows"] == 3


def test_a_second_start_under_a_relative_path(tmp_path, monkeypatch):
    """The target's path is relative this time; it was refused as another run."""
    for name in ("target", "other"):
        (tmp_path / name).mkdir()
    with journal(tmp_path / "out", model=str(tmp_path / "target")) as out:
        out.add(0, row(0))
    monkeypatch.chdir(tmp_path)
    with journal(tmp_path / "out", model="target") as out:
        assert out.is_done(0)
    with pytest.raises(UserError, match="model was .*target', now 'other'"), journal(tmp_path / "out", model="other"):
        pass


def test_a_second_start_knows_what_is_done(tmp_path):
    with journal(tmp_path) as out:
        for index in (0, 1, 2, 3, 5):
            out.add(index, row(index))
        out.reject(6, "row-6", "empty answer", "said nothing")
    with journal(tmp_path) as out:
        assert [index for index in range(10) if out.is_done(index)] == [0, 1, 2, 3, 5, 6]
        assert out.num_done == 6
        for index in (4, 7, 8, 9):
            out.add(index, row(index))
    assert ids(tmp_path)["shard-00001.jsonl"] == ["row-4", "row-5", "row-7"]
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["reason"]) for entry in rejects] == [("row-6", "empty answer")]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no newline"])
def test_a_damaged_last_line_is_cut_and_its_row_is_missing(tmp_path, damage):
    with journal(tmp_path) as out:
        for index in (0, 1, 2):
            out.add(index, row(index))
    partial = tmp_path / ".journal" / "00000.partial"
    content = partial.read_bytes()
    partial.write_bytes(
        {"cut": content[:-7], "flipped": content[:-5] + b"X" + content[-4:], "no newline": content[:-1]}[damage]
    )
    with journal(tmp_path) as out:
        assert [out.is_done(index) for index in range(4)] == [True, True, False, False]
        for index in range(2, 10):
            out.add(index, row(index))
    assert [len(rows) for rows in ids(tmp_path).values()] == [4, 4, 2]


def test_killed_between_the_last_row_and_sealing(tmp_path):
    """The partial file is full and nothing else happened: the next start seals it."""
    with journal(tmp_path, total=4) as out:
        out._seal = lambda shard: None  # the kill
        for index in range(4):
            out.add(index, row(index))
    assert ids(tmp_path) == {}
    with journal(tmp_path, total=4) as out:
        assert out.complete
    assert ids(tmp_path) == {"shard-00000.jsonl": ["row-0", "row-1", "row-2", "row-3"]}


def test_killed_between_sealing_and_tidying_up(tmp_path):
    with journal(tmp_path, total=4) as out:
        for index in range(3):
            out.add(index, row(index))
        partial = tmp_path / ".journal" / "00000.partial"
        out.add(3, row(3))
    partial.write_bytes(b"leftover")
    with journal(tmp_path, total=4) as out:
        assert out.complete
    assert not partial.exists()


def test_other_settings_are_refused_and_named(tmp_path):
    with journal(tmp_path, temperature="0.7", model="a") as out:
        out.add(0, row(0))
    with pytest.raises(UserError, match=r"temperature was '0.7', now '1.0'.*--output-dir"):
        journal(tmp_path, temperature="1.0", model="a").__enter__()
    with pytest.raises(UserError, match="data_shard_size was 4, now 5"):
        journal(tmp_path, shard_size=5, temperature="0.7", model="a").__enter__()
    with journal(tmp_path, temperature="0.7", model="a") as out:  # the refusals changed nothing
        assert out.is_done(0)


@pytest.mark.parametrize("cut_back", [True, False])
def test_half_a_line_on_a_full_disk_does_not_stand_before_the_next(tmp_path, monkeypatch, cut_back):
    """Answers that arrive while the run stops used to be written behind half a line, and the shard was sealed from the
    wrong places. Without the cut (the control) it still is."""

    def full(file, line):
        file.write(line[: len(line) // 2])
        if not cut_back:
            monkeypatch.setattr(out._open[0], "file", Uncut(file), raising=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    class Uncut:
        def __init__(self, file):
            self.write, self.fileno, self.close, self.name = file.write, file.fileno, file.close, file.name

        def truncate(self, size):
            pass

        seek = truncate

    with journal(tmp_path) as out:
        out.add(0, row(0))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_all", full)
            with pytest.raises(OSError, match=r"partial"):
                out.add(1, row(1))
        for index in (1, 2, 3):
            out.add(index, row(index))
    lines = (tmp_path / "shard-00000.jsonl").read_bytes()
    whole = b"".join(json.dumps(row(index), ensure_ascii=False).encode() + b"\n" for index in range(4))
    assert (lines == whole) == cut_back


def test_two_runs_cannot_write_at_once(tmp_path):
    with journal(tmp_path), pytest.raises(UserError, match="another run is writing"):
        journal(tmp_path).__enter__()


def test_a_missing_shard_is_noticed(tmp_path):
    with journal(tmp_path, total=4) as out:
        for index in range(4):
            out.add(index, row(index))
    (tmp_path / "shard-00000.jsonl").unlink()
    with pytest.raises(UserError, match="shard-00000.jsonl: missing"):
        journal(tmp_path, total=4).__enter__()


def test_rejects_can_be_asked_again_in_sealed_and_open_shards(tmp_path):
    with journal(tmp_path, total=6) as out:
        for index in (0, 2, 4):
            out.add(index, row(index))
        out.reject(1, "row-1", "HTTP 500")
        out.reject(3, "row-3", "broken image")
        out.reject(5, "row-5", "HTTP 500")
    assert list(ids(tmp_path)) == ["shard-00000.jsonl", "shard-00001.jsonl"]
    with journal(tmp_path, total=6) as out:
        assert out.reopen(lambda reason: reason == "HTTP 500") == 2
        assert [out.is_done(index) for index in range(6)] == [True, False, True, True, True, False]
        out.add(1, row(1))
        out.add(5, row(5))
    assert ids(tmp_path) == {"shard-00000.jsonl": ["row-0", "row-1", "row-2"], "shard-00001.jsonl": ["row-4", "row-5"]}


def test_a_row_cannot_be_added_twice(tmp_path):
    with journal(tmp_path) as out:
        out.add(0, row(0))
        with pytest.raises(AssertionError, match="already done"):
            out.add(0, row(0))
