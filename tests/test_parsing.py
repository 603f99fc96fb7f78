"""Documents from outside: a typed record, or one line that names the place."""

import contextlib
import math
import os
import threading
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from fledge.errors import UserError
from fledge.parsing import convert, parse_json, read_json, read_json_lines, read_python_json, read_yaml


class Report(msgspec.Struct, forbid_unknown_fields=True):
    rows: Annotated[int, msgspec.Meta(ge=0)]
    name: str = ""


BROKEN_JSON = {
    b"": "not valid JSON",
    b'{"rows": 1} x': "file.json:1",
    b'{"rows":\n 1,,}': "file.json:2",
    b'{"rows": NaN}': "not valid JSON",
    b'{"rows": 1, "name": "\\ud800"}': "not valid JSON",
    b'{"rows": 1, "name": "\xff"}': "not valid JSON",
    b'{"rows": "1"}': "Expected `int`, got `str` - at `$.rows`",
    b'{"rows": -1}': ">= 0",
    b'{"rows": true}': "$.rows",
    b'{"rows": 1, "more": 2}': "unknown field `more`",
    b'{"name": "x"}': "missing required field `rows`",
    b"[1]": "Expected `object`",
}


@pytest.mark.parametrize("content", BROKEN_JSON, ids=repr)
def test_broken_json_is_one_line_with_its_place(content):
    with pytest.raises(UserError) as found:
        parse_json(content, Report, "file.json", hint="Write it again.")
    assert BROKEN_JSON[content] in str(found.value) and str(found.value).startswith("file.json")
    assert str(found.value).endswith("Write it again.") and "\n" not in str(found.value)


def test_nesting_without_end_is_refused():
    with pytest.raises(UserError, match="not valid JSON"):
        parse_json(b"[" * 100_000, list, "file.json")  # type: ignore[type-abstract]
    with pytest.raises(UserError, match="recursion"):
        parse_json(b"[" * 100_000 + b"]" * 100_000, Any, "file.json")  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_good_json_is_read(mark):
    """Negative control of the refusals; a byte order mark is no error."""
    assert parse_json(mark + b'{"rows": 2}', Report, "file.json") == Report(2)


def test_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content, message in {
        b"rows: [": "not valid YAML",
        b"rows: 2026-13-01": "not valid YAML",
        b"rows: \xff": "recipe.yaml:1: not UTF-8",
        b"rows: !!python/object:os.system x": "not valid YAML",
        b"[" * 5000: "not valid YAML",
        b"- 1": "Expected `object`",
        b"rows: 1\nname: x\nrows: 2": "the key 'rows' is given twice.*line 3",
        b"": "missing required field",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_yaml(path, Report)
    path.write_bytes(b"rows: 3\nname: x\n")
    assert read_yaml(path, Report) == Report(3, "x")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file. Export it."):
        read_json(tmp_path / "absent.json", Report, hint="Export it.")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path, Report)
    (tmp_path / "large.json").write_bytes(b" " * 2_000_000)
    with pytest.raises(UserError, match="larger than the 1 MiB"):
        read_json(tmp_path / "large.json", Report, largest=1 << 20)


def test_no_more_is_reserved_than_a_file_holds(tmp_path):
    """`read` reserves what it is asked for: a file of a few bytes once took gigabytes where much is allowed."""
    (tmp_path / "small.json").write_text('{"rows": 3}')
    assert read_json(tmp_path / "small.json", Report, largest=1 << 62) == Report(3)


def test_a_pipe_is_read_to_its_end_or_limit():
    for size, sound in ((3 << 20, True), (5 << 20, False)):
        reading, writing = os.pipe()
        content = b'{"rows": 3, "name": "' + b"x" * size + b'"}'
        threading.Thread(target=_pour, args=(writing, content), daemon=True).start()
        path = Path(f"/dev/fd/{reading}")
        if sound:
            assert len(read_json(path, Report, largest=4 << 20).name) == size
        else:
            with pytest.raises(UserError, match="larger than the 4 MiB"):
                read_json(path, Report, largest=4 << 20)
        os.close(reading)


def _pour(handle: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(handle, "wb") as pipe:
        pipe.write(content)


def test_convert_names_the_field():
    with pytest.raises(UserError, match=r"row 3: Expected `int`, got `str` - at `\$.rows`"):
        convert({"rows": "3"}, Report, "row 3")
    assert convert({"rows": 3}, Report, str(Path("x"))) == Report(3)


def test_json_that_python_wrote_may_hold_nan(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"loss": NaN,\n "scale": Infinity}')
    found = read_python_json(path, dict[str, float])
    assert math.isnan(found["loss"]) and found["scale"] == math.inf
    with pytest.raises(UserError, match="state.json:1: not valid JSON"):
        read_json(path, dict[str, float])
    for content, message in {
        '{"loss": 1,\n': "state.json:2: not valid JSON",
        '{"loss": "1"}': r"Expected `float`, got `str` - at `\$\[...\]`",
        "[" * 100_000: "not valid JSON .*recursion",
        '{"loss": ' + "9" * 5000 + "}": "not valid JSON .*digits",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_python_json(path, dict[str, float])


def test_json_lines_name_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"rows": 1}\n\n{"rows": 2}\n')
    assert list(read_json_lines(path, Report)) == [(f"{path}:1", Report(1)), (f"{path}:3", Report(2))]
    path.write_text('{"rows": 1}\n\n{"rows": "2"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:3: Expected `int`, got `str` - at `\$.rows`"):
        list(read_json_lines(path, Report))
