"""Containers that are damaged, compressed, in another encoding or typed: the rows as they are, or one line."""

import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from fledge.data import rows
from fledge.data.rows import read_rows
from fledge.errors import UserError

VALUES = [{"id": str(i), "text": f"row {i} ü"} for i in range(500)]
LINES = "".join(json.dumps(value) + "\n" for value in VALUES).encode()
ARRAY = json.dumps(VALUES).encode()


def values(path, **kwargs) -> list:
    return [row.value for row in read_rows(str(path), **kwargs)]


def errors(path) -> list[str]:
    return [row.error for row in read_rows(str(path)) if row.error]


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def write_arrow(path, table: pa.Table, new) -> None:
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)


def test_compressed_files_and_arrow_give_the_same_rows(tmp_path):
    contents = {
        "a.jsonl.gz": gzip.compress(LINES), "b.jsonl.zst": zst(LINES), "c.json.gz": gzip.compress(ARRAY),
        "d.json.zst": zst(ARRAY), "e.json": b"\xef\xbb\xbf" + ARRAY, "f.jsonl": b"\xef\xbb\xbf" + LINES,
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    table = pa.Table.from_pylist(VALUES)
    write_arrow(tmp_path / "g.arrow", table, pa.ipc.new_stream)
    write_arrow(tmp_path / "h.arrow", table, pa.ipc.new_file)
    for name in (*contents, "g.arrow", "h.arrow"):
        assert values(tmp_path / name) == VALUES, name


def test_values_of_tables_are_what_json_would_hold(tmp_path):
    """Timestamps and pictures ended regenerate with a traceback; fields that arrow fills up reached templates."""
    row = {
        "messages": [{"role": "user", "content": "Hi", "tool_calls": None}, {"role": "assistant", "tool_calls": ["x"]}],
        "time": datetime.datetime(2024, 5, 1, 12), "day": datetime.date(2024, 5, 1),
        "took": datetime.timedelta(seconds=2),
        "price": decimal.Decimal("1.50"), "image": {"bytes": b"\x89PNG", "path": None}, "text": b"plain",
        "raw": b"\xff",
        "parts": [{"type": "image", "bytes": b"\x89PNG"}], "named": {"bytes": None, "path": "a.png"},
    }  # fmt: skip
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = values(tmp_path / "a.parquet")
    png = "data:image/png;base64,iVBORw=="
    assert found == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": ["x"]}],
        "time": "2024-05-01T12:00:00", "day": "2024-05-01", "took": 2.0, "price": 1.5, "image": png, "text": "plain",
        "raw": "/w==", "parts": [{"type": "image", "image": png}], "named": "a.png",
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_a_saved_dict_of_data_sets_has_splits(tmp_path):
    DatasetDict(train=Dataset.from_list(VALUES[:2]), test=Dataset.from_list(VALUES[2:3])).save_to_disk(tmp_path / "d")
    assert values(tmp_path / "d") == VALUES[:2] and values(tmp_path / "d", split="test") == VALUES[2:3]
    with pytest.raises(UserError, match="no split 'dev', it has test, train"):
        values(tmp_path / "d", split="dev")


def test_a_folder_takes_data_only_and_says_which(tmp_path, capsys):
    """Copies that editors keep in hidden folders were trained a second time."""
    taken = ("a.jsonl", "deep/b.json")
    for name in (
        *taken,
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".cache/x.jsonl",
        "c.jsonl~",
        "run.json",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    rows._say_files.cache_clear()
    assert len(values(tmp_path)) == len(taken) == len(values(tmp_path))
    assert capsys.readouterr().err.count("2 data files: a.jsonl, deep/b.json") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cannot be read to its end"),
        ("a.jsonl.gz", LINES, "cannot be read to its end"),
        ("a.jsonl.zst", zst(LINES)[:-9], "cannot be read to its end"),
        ("a.json.gz", gzip.compress(ARRAY)[:-9], "cannot be read to its end"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "not UTF-8 .it begins with the bytes ff fe"),
        ("a.json", ARRAY.decode().encode("utf-16-le"), "not UTF-8 .it begins with"),
        ("a.json", json.dumps(VALUES, ensure_ascii=False).encode("latin-1"), "byte 28 of the file is 0xfc"),
        ("a.arrow", b"ARROW1 not really", "damaged at or after row 0"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', r"a\.json:2: element 1 of the array does not follow a comma: found '\{'"),
        ("a.json", b'[{"a": 1},]', r"a\.json:1: element 1 .* not valid JSON"),
        ("a.json", b'[,{"a": 1}]', r"a\.json:1: element 0 .* not valid JSON"),
        ("a.json", b'[{"a": 1}]\n\n{"b": 2}', r"a\.json:3: '\{' after the end of the array"),
        ("a.json", b'[{"a": 1},', "element 1 .* not valid JSON"),
        ("a.json", b'[{"a": 1}', "found the end of the file"),
        ("a.json", b'[{"a": NaN}]', "NaN is no JSON value"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_ends_a_file_is_one_line(tmp_path, name, content, message):
    """Arrays with missing commas or text behind their end were accepted; cut files ended in a traceback."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        values(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_damaged_pages_of_a_parquet_file_are_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(VALUES), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[40:400] = b"\0" * 360
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.parquet: damaged at or after row 0"):
        values(path)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\\ud83d"}', r"lone surrogate \ud83d"),
        (b'{"a": "\\udc00 x"}', r"lone surrogate \udc00"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        ('{"a": "ü"}'.encode("latin-1"), "byte 17 of the file is 0xfc"),
        (b"[1]", "a row is a JSON object, found list"),
    ],
)
def test_a_damaged_line_is_one_rejected_row(tmp_path, line, error):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line + b'\n{"id": "\\ud83d\\ude00"}\n')
    assert values(path) == [{"id": 0}, None, {"id": "😀"}]
    (found,) = errors(path)
    assert error in found


def test_lone_surrogates_in_an_array_are_one_rejected_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "\\ud83d\\ude00"}, {"a": "\\ud83d"}, {"a": 1}]')
    assert values(path) == [{"a": "😀"}, None, {"a": 1}]
    assert r"lone surrogate \ud83d" in errors(path)[0]


def test_a_line_that_is_too_long_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr("fledge.data.row_files.LARGEST_ROW", 64)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n{"a": 2}\n')
    assert values(path) == [{"a": 1}, None, {"a": 2}]


def test_repeated_keys_of_an_object_take_the_last(tmp_path):
    """JSON leaves it open; Python, JavaScript and arrow agree on the last, so no reader sees another row than we."""
    (tmp_path / "a.jsonl").write_text('{"a": 1, "a": 2}\n')
    assert values(tmp_path / "a.jsonl") == [{"a": 2}]
