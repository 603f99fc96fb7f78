"""Every document that fledge reads again: damaged in all the usual ways it is one line that names the file.

Each was a traceback somewhere: a field of another type was met long after the file was read.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from fledge.bench.compare import read_summary
from fledge.bench.prompts import read_question_file
from fledge.bench.rows import read_rows
from fledge.data.dataset import ARRAYS, TokenizedData
from fledge.data.image_table import FILE, ImageTable
from fledge.data.images import ImageRef
from fledge.decoding.tree_profile import read_profile
from fledge.errors import UserError
from fledge.export.card import TrainerState, TrainingRun, _json_or_empty
from fledge.train.evaluate import read_best

SET = {"questions": 4, "speedup": {"value": 1.2, "low": 1.1, "high": 1.3}, "acceptance": {"tau": 1.6},
       "baseline": {"tokens_per_s": 9.0}, "eagle": {"tokens_per_s": 11.0},
       "quality": {"compared": 4, "identical": 4}}  # fmt: skip
SUMMARY = {"format": 1, "model_id": "m", "fingerprint": "f", "settings": {"tree": None}, "sets": {"quick": SET}}
PROFILE = {"format": 1, "profile": {
    "tree": {"total_token": 8, "depth": 2, "top_k": 4}, "tau": 1.5, "tokens_per_s": 1.0, "plain_tokens_per_s": 1.0,
    "temperature": 0.0, "measured": {}, "curve": [], "hardware": {},
    "costs": {"verify_s": {"8": 0.1}, "draft_s": {"4x2": 0.1}, "overhead_s": 0.0},
}}  # fmt: skip
RUN = {"target": "T", "steps": 3, "metrics": {"eval_tau": 1.5, "eval_acc_0": float("nan")}, "config": {"seed": 1}}
STATE = {"log_history": [{"loss": float("nan")}], "global_step": 3}
# name -> (reader, sound document)
READERS = {
    "summary": (read_summary, SUMMARY),
    "profile": (read_profile, PROFILE),
    "provenance": (lambda path: _json_or_empty(path, TrainingRun), RUN),
    "trainer state": (lambda path: _json_or_empty(path, TrainerState), STATE),
}


def places(value, path=()):
    """Every place in a document at which something of another type could stand."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


def changed(document, path, value):
    if not path:
        return value
    return {**document, path[0]: changed(document[path[0]], path[1:], value)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff{}", b"[" * 100_000, b'{"a": 1} x'])
def test_what_is_no_document_is_one_line(name, content, tmp_path):
    path = tmp_path / "document.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="document.json") as found:
        READERS[name][0](path)
    assert "\n" not in str(found.value) and len(str(found.value)) < 500


@pytest.mark.parametrize("name", READERS)
def test_a_sound_document_is_read(name, tmp_path):
    """Negative control: NaN, as Python writes it, is a number there."""
    path = tmp_path / "document.json"
    path.write_text(json.dumps(READERS[name][1]))
    READERS[name][0](path)


FREE = {"seed", "measured", "hardware", "tree", "settings"}  # not read, or may be absent


@pytest.mark.parametrize(("name", "place"), [
    (name, place) for name, (_, document) in READERS.items() for place in places(document)
    if place and place[-1] not in FREE | {"global_step"}
])  # fmt: skip
def test_a_field_of_another_type_is_named(name, place, tmp_path):
    reader, document = READERS[name]
    path = tmp_path / "document.json"
    path.write_text(json.dumps(changed(document, place, ["x"])))
    with pytest.raises(UserError, match=r"document\.json: (Expected|Invalid)"):
        reader(path)


@pytest.mark.parametrize("line", [
    '{"turns": 5}', '{"turns": {"a": 1}}', '{"turns": ["a"], "reference": 3}', '{"turns": ["a"], "code_check": []}',
    '{"turns": ["a"], "system": ["b"]}', '{"turns": ["a"], "question_id": {}}', "[" * 100_000, '{"turns": ["\\ud800"]}',
])  # fmt: skip
def test_a_question_of_other_types_is_named_by_its_line(line, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"turns": ["good"]}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:3"):
        read_question_file(path, "q")
    path.write_bytes(b'{"turns": ["good"]}\n{"turns": ["\xff"]}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:2"):
        read_question_file(path, "q")
    path.write_text('{"turns": ["good"], "reference": ["a"], "system": "s", "question_id": 7}\n')
    assert read_question_file(path, "q")[0].id == "7"  # negative control


def test_rows_that_nest_without_end_are_torn_rows(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"dataset": "quick"}\n' + "[" * 100_000 + '\n{"dataset": 3}\n')
    assert read_rows(path) == [{"dataset": "quick"}]


def test_a_torn_record_of_the_best_head_counts_as_none(tmp_path):
    (tmp_path / "best").mkdir()
    record = tmp_path / "best" / "best.json"
    record.write_text('{"step": "4", "tau": 1.5, "tokens": 3, "seconds": 1.0}')
    assert read_best(tmp_path) is None
    record.write_text('{"step": 4, "tau": 1.5, "tokens": 3, "seconds": 1.0}')
    assert read_best(tmp_path).step == 4


class NoPictures:
    vision = None


@pytest.fixture
def tokens(tmp_path) -> Path:
    """A cache of two samples of three tokens."""
    for name, array in zip(ARRAYS, (np.array([0, 3, 6]), np.zeros(2, bool), np.zeros(2, np.int64)), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "tokens.bin").write_bytes(np.arange(6, dtype=np.int32).tobytes())
    (tmp_path / "mask.bin").write_bytes(np.ones(6, bool).tobytes())
    (tmp_path / "ids.json").write_text('["a", "b"]')
    (tmp_path / "report.json").write_text('{"report": {"rows": 2, "samples": 2}, "settings": {}}')
    return tmp_path


@pytest.mark.parametrize(("name", "content"), [
    ("offsets.npy", b""), ("cut.npy", b"\x93NUMPY"), ("truncated.npy", b"x" * 200), ("tokens.bin", b"123"),
    ("mask.bin", b"\x01"), ("ids.json", b'["a", 3]'), ("ids.json", b'["a"]'), ("ids.json", b"["),
    ("report.json", b'{"report": {"rows": "2"}}'), ("report.json", b"{}"),
])  # fmt: skip
def test_damaged_tokenised_data_is_one_line(name, content, tokens):
    assert len(TokenizedData(tokens, NoPictures())) == 2  # type: ignore[arg-type]  # negative control
    (tokens / name).write_bytes(content)
    with pytest.raises(UserError, match="Delete this folder and run again"):
        TokenizedData(tokens, NoPictures())  # type: ignore[arg-type]


def test_a_damaged_table_of_pictures_is_one_line(tmp_path):
    picture = ImageRef("a.png", "0" * 8, 4, 4, 1, 5)
    with ImageTable.writer(tmp_path, True) as table:
        table.add([picture])
    assert ImageTable(tmp_path)[0] == (picture,)  # negative control
    content = (tmp_path / FILE).read_bytes()
    for damaged in (content.replace(b'"a.png"', b"1234567"), content.replace(b"[", b"{")):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(UserError, match=r"images.jsonl \(sample 0\).*Delete this folder"):
            ImageTable(tmp_path)[0]
