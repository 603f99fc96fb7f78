"""Containers to rows: every format gives the same rows, and a broken one says where."""

import gzip
import json

import datasets
import pytest

from fledge.data import rows
from fledge.data.rows import content_hash, count_rows, data_files, read_rows
from fledge.errors import UserError
from fledge.regeneration.journal import Journal

VALUES = [{"id": str(i), "text": f"row {i} ü\n" * (i + 1)} for i in range(7)]


def values(path) -> list[dict]:
    return [row.value for row in read_rows(str(path))]


def test_every_container_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(value) + "\n" for value in VALUES)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(VALUES, indent=2))
    (tmp_path / "c.json").write_text(lines)  # JSON lines under the wrong name are common
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_list(VALUES).to_parquet(tmp_path / "e.parquet")
    datasets.Dataset.from_list(VALUES).save_to_disk(tmp_path / "f")
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.parquet", "f"):
        assert values(tmp_path / name) == VALUES, name


def test_a_folder_is_its_files_in_order_without_what_we_wrote_there(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "rejects.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    found = list(read_rows(str(tmp_path)))
    assert [row.value["name"] for row in found] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert len({row.key for row in found}) == 3  # keys stay unique across files


def test_a_broken_line_is_one_row_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n\n{"id": 2, \n[1]\n\xff\xfe{\n{"id": 3}\n')
    found = list(read_rows(str(path)))
    assert [row.where for row in found] == [f"{path}:{n}" for n in (1, 3, 4, 5, 6)]
    assert [row.error is None for row in found] == [True, False, False, False, True]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_json_arrays_are_decoded_through_a_window_smaller_than_a_row(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text("\n [" + ",\n".join(json.dumps(value, indent=1, ensure_ascii=False) for value in VALUES) + "]\n")
    assert values(path) == VALUES


def test_the_place_in_an_array_is_the_line_its_element_begins_at(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"id": 0},\n\n{"id":\n 1}, {"id": 2}\n]')
    assert [row.where for row in read_rows(str(path))] == [f"{path}:2", f"{path}:4", f"{path}:5"]


def test_a_broken_array_names_file_line_and_element(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"id": 0},\n{"id": 1,}\n]')
    with pytest.raises(UserError, match=r"a\.json:3: element 1 .* not valid JSON"):
        values(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.txt", b"hello", "unknown file type.*jsonl"),
    ],
)
def test_unreadable_files_say_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        values(tmp_path / name)


def test_missing_paths_and_empty_folders_never_reach_the_hub(tmp_path):
    for path in (tmp_path / "no.jsonl", "no.jsonl", "./no", "a/b/c", ""):
        with pytest.raises(UserError, match="no such file or folder"):
            values(path)
    with pytest.raises(UserError, match="no data files in this folder"):
        values(tmp_path)


def test_answers_without_a_finished_file_are_called_that(tmp_path):
    """A run that was stopped early has all of its rows in the journal; "no data files" helped nobody."""
    with Journal(tmp_path, total=3, shard_size=3, settings={}) as journal:
        journal.add(0, {"id": "a"})
    with pytest.raises(UserError, match="has not finished a file yet. Start the same command again"):
        data_files(tmp_path)


def test_counting_rows_needs_no_parsing(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 5)
    datasets.Dataset.from_list(VALUES).to_parquet(tmp_path / "b.parquet")
    assert count_rows(str(tmp_path)) == 5 + len(VALUES)


def test_the_content_hash_follows_the_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    before = content_hash(str(path))
    assert content_hash(str(path)) == before
    path.write_text("{ }\n")
    assert content_hash(str(path)) != before
