"""Finished shards are compared with what was sealed, by the run that continues and by whoever trains on them."""

import json
import random
import shutil
from pathlib import Path

import pytest

from fledge.cli import run_command
from fledge.data.sealed import INNER, verify_sealed
from fledge.errors import UserError
from fledge.regeneration.journal import Journal


def journal(folder: Path) -> Journal:
    return Journal(folder, total=10, shard_size=4, settings={})


@pytest.fixture
def answers(tmp_path) -> Path:
    """Ten rows in three shards, one of them rejected."""
    with journal(tmp_path / "answers") as out:
        for index in range(9):
            out.add(index, {"id": str(index), "text": f"answer {index} with a few words"})
        out.reject(9, "9", "empty answer", "said nothing")
    return tmp_path / "answers"


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 7
    path.write_bytes(content)


def resume(folder: Path) -> None:
    with journal(folder):
        pass


READERS = {"resume": resume, "train": verify_sealed}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(14))
def test_a_flipped_bit_is_found(seed, reader, answers):
    """Only the size was compared: 14 of 14 flipped bits went into the training data."""
    flip(answers / "shard-00001.jsonl", seed)
    with pytest.raises(UserError, match="shard-00001.jsonl: its SHA-256 is not the one .*00001.sealed"):
        READERS[reader](answers)


@pytest.mark.parametrize("reader", READERS)
def test_a_cut_or_missing_shard_is_found(reader, answers):
    path = answers / "shard-00002.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="; it was sealed with"):
        READERS[reader](answers)
    path.unlink()
    with pytest.raises(UserError, match="; it was sealed with"):
        READERS[reader](answers)


@pytest.mark.parametrize("reader", READERS)
def test_sound_answers_pass(reader, answers):
    """Negative control."""
    READERS[reader](answers)


DAMAGED = {
    "cut": (lambda text: text[:-9], "not valid JSON"),
    "not UTF-8": (lambda text: text.replace("said", "s\udcffid"), "not valid JSON"),
    "count of text": (lambda text: text.replace('"rows": 1', '"rows": "1"', 1), "Expected `int`"),
    "negative": (lambda text: text.replace('"bytes": ', '"bytes": -', 1), "bytes"),
    "another file": (lambda text: text.replace("shard-00002", "../shard-2"), "file"),
    "rows lost": (lambda text: text.replace('"rows": 1', '"rows": 2', 1), "are not its 2 input rows"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_sealed_file_is_one_line(case, answers):
    change, message = DAMAGED[case]
    path = answers / INNER / "00002.sealed"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed, errors="surrogateescape")
    for reader in READERS.values():
        with pytest.raises(UserError, match=message) as found:
            reader(answers)
        assert str(path) in str(found.value) and "\n" not in str(found.value)


def test_answers_that_are_asked_again_are_looked_at_first(answers, tmp_path, capfd):
    flags = ["--data-name-or-path", str(answers), "--output-dir", str(tmp_path / "out")]
    assert run_command("regenerate", flags) == 1 and "SHA-256" not in capfd.readouterr().err  # control: no questions
    flip(answers / "shard-00001.jsonl", 3)
    assert run_command("regenerate", flags) == 1
    assert "its SHA-256 is not the one it was sealed with" in " ".join(capfd.readouterr().err.split())


def test_a_sealed_file_of_another_shard_is_refused(answers):
    shutil.copy(answers / INNER / "00000.sealed", answers / INNER / "00001.sealed")
    with pytest.raises(UserError, match="its rows are not those of shard 00001"):
        resume(answers)


def test_a_sealed_file_begins_where_its_shard_does(answers):
    path = answers / INNER / "00002.sealed"
    path.write_text(path.read_text().replace('"first_row": 8', '"first_row": 9'))
    with pytest.raises(UserError, match="its rows are not those of shard 00002"):
        resume(answers)


def test_a_copy_without_journal_is_checked_by_its_manifest(answers):
    shutil.rmtree(answers / INNER)
    verify_sealed(answers)
    flip(answers / "shard-00000.jsonl", 3)
    with pytest.raises(UserError, match="SHA-256"):
        verify_sealed(answers)
    verify_sealed(answers / "shard-00001.jsonl")  # one file alone is checked alone
    with pytest.raises(UserError, match="SHA-256"):
        verify_sealed(answers / "shard-00000.jsonl")


def test_data_of_others_passes(tmp_path):
    """Negative control: a manifest.json of something else is not ours to judge."""
    (tmp_path / "shard-00000.jsonl").write_text("{}\n")
    verify_sealed(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a data set", "shards": 3}))
    verify_sealed(tmp_path)
