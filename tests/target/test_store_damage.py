"""Whatever happens to a store's files is found before anything is trained on it: one line, with the remedy."""

import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
from saved_target import save_target, tree_bytes

from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.storage.states.manifest import canonical, read_manifest
from fledge.storage.states.reader import HiddenStore


@pytest.fixture
def copy(store, tmp_path) -> Path:
    return shutil.copytree(store, tmp_path / "copy")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def read_all(folder: Path) -> None:
    """What a training run does: open everything, load the head, read every record."""
    import torch

    stored = HiddenStore(folder)
    stored.head(torch.device("cpu"))
    stored.counts()
    for index in range(len(stored)):
        stored[index]


def refused(folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        read_all(folder)
    assert "\n" not in str(raised.value)


def restate(folder: Path, **changes) -> None:
    """A manifest that is sound in itself and states other settings."""
    manifest = read_manifest(folder)
    other = dataclasses.replace(manifest, identity=dataclasses.replace(manifest.identity, **changes))
    (folder / "manifest.json").write_text(json.dumps(other.document()))


def test_a_sound_store_is_read(copy):
    read_all(copy)
    HiddenStore(copy).verify()


@pytest.mark.parametrize("back", [1, 5_000, 100_000])
def test_a_flipped_byte_in_the_states(copy, back):
    path = copy / "shard-00001.safetensors"
    flip(path, path.stat().st_size - back)
    with pytest.raises(UserError, match="shard-00001.*checksum.*does not match.*only this shard is made anew"):
        HiddenStore(copy).verify()


def test_a_flipped_byte_is_found_when_the_record_is_read(copy):
    stored = HiddenStore(copy)
    slot = stored.shards[1]._slots["tap_hidden"]
    flip(copy / "shard-00001.safetensors", slot.begin + 777)
    refused(copy, "the checksum of record 'row-.*' does not match")


def test_a_flipped_byte_in_any_tensor_is_found_in_training(copy):
    """Tables, offsets and ids were under the whole file's checksum alone, which only `fledge inspect` compared."""
    path = copy / "shard-00001.safetensors"
    sound = path.read_bytes()
    slots = HiddenStore(copy).shards[1]._slots
    assert {"offsets", "record_crc", "count_ids", "counts", "position_ids"} <= slots.keys()
    for slot in slots.values():
        for last in (False, True):
            at = slot.begin + (math.prod(slot.shape) * slot.dtype.itemsize - 1 if last else 0)
            flip(path, at)
            refused(copy, "shard-00001.*(is made anew|does not match)")
            path.write_bytes(sound)
    read_all(copy)  # negative control


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_byte_in_the_header_is_found_in_training(copy, seed):
    path = copy / "shard-00001.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, random.Random(seed).randrange(8 + length))
    refused(copy, "shard-00001")


def edited_header(path: Path, edit) -> None:
    """The same shard with another header of the same length."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    changed = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(content[:8] + changed.ljust(length) + content[8 + length :])


def swap(header: dict, one: str, other: str) -> None:
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"], header[one]["data_offsets"],
    )  # fmt: skip


@pytest.mark.parametrize(("edit", "says"), [
    (lambda h: h["input_ids"].update(dtype="F32"), "input_ids is F32"),
    (lambda h: h["loss_mask"].update(shape=[3]), r"loss_mask is BOOL \(3,\)"),
    (lambda h: h["loss_mask"].update(shape=["3"]), "Expected `int`"),
    (lambda h: h.pop("record_crc"), r"\['record_crc'\] are missing"),
    (lambda h: h["offsets"].update(data_offsets=[0, 8]), "offsets lies at"),
    (lambda h: swap(h, "input_ids", "teacher_argmax"), "its table of supervised tokens"),
    (lambda h: h.pop("__metadata__"), "missing required field"),
])  # fmt: skip
def test_a_header_that_says_something_else(copy, edit, says):
    edited_header(copy / "shard-00001.safetensors", edit)
    refused(copy, says)


def test_a_header_that_says_the_same(copy):
    """Negative control of the edits above."""
    edited_header(copy / "shard-00001.safetensors", lambda header: None)
    read_all(copy)


@pytest.mark.parametrize(("edit", "says"), [
    (lambda text: text[:-50], "plan.jsonl:[0-9]+: not valid JSON"),
    (lambda text: text.replace('"row-', '"ruw-', 1), "not the plan that the manifest names"),
    (lambda text: text.replace('"shard": 1', '"shard": "1"', 1), "Expected `int`"),
    (lambda text: text + text.splitlines()[0] + "\n", "stands there twice"),
    (lambda text: "", "not the plan that the manifest names"),
])  # fmt: skip
def test_a_damaged_plan(copy, edit, says):
    path = copy / "plan.jsonl"
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    refused(copy, says)


@pytest.mark.parametrize(("edit", "says"), [
    (lambda d: d["counts"].update(records=d["counts"]["records"] + 1), "its counts are not those of its shards"),
    (lambda d: d["shards"][0].update(file="../shard-00000.safetensors"), "matching regex"),
    (lambda d: d["shards"][0].update(bytes="1"), "Expected `int`"),
    (lambda d: d["identity"].update(vocab_size=0), "vocab_size"),
    (lambda d: d["identity"].pop("tokenizer"), "missing required field `tokenizer`"),
])  # fmt: skip
def test_a_manifest_whose_checksum_was_made_anew(copy, edit, says):
    path = copy / "manifest.json"
    document = json.loads(path.read_text())
    document.pop("checksum")
    edit(document)
    checksum = hashlib.sha256(canonical(document)).hexdigest()
    path.write_text(json.dumps({**document, "checksum": checksum}))
    refused(copy, says)


def test_a_truncated_shard(copy):
    path = copy / "shard-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    refused(copy, r"shard-00002.*bytes; it was sealed with.*only this shard is made anew")


def test_a_missing_shard(copy):
    (copy / "shard-00003.safetensors").unlink()
    refused(copy, r"shard-00003.safetensors: missing; it was sealed with")


def test_a_damaged_header(copy):
    flip(copy / "shard-00000.safetensors", 9)
    refused(copy, r"shard-00000.safetensors \(header\)|with other settings|another target")


@pytest.mark.parametrize(
    "changes",
    [{"target": "another"}, {"template_fingerprint": "0" * 64}, {"dtype": "bfloat16"}, {"tap_layers": [0, 1, 2]}],
)
def test_a_manifest_of_other_states(copy, changes):
    restate(copy, **changes)
    refused(copy, "made with another target, template, dtype or other settings")


def test_a_manifest_of_another_target(copy, extract_args, tmp_path):
    other = save_target(tmp_path / "other", seed=5)
    extract(extract_args(tmp_path / "store", target=str(other), max_samples=9))
    shutil.copy(tmp_path / "store" / "manifest.json", copy / "manifest.json")
    refused(copy, "made with another target|incomplete|bytes; it was sealed with")


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "hidden_store"}'])
def test_an_unreadable_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    refused(copy, r"manifest.json.*(not valid JSON|Expected|format None)")


def test_an_edited_manifest(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"'))
    refused(copy, "edited or damaged")


def test_a_damaged_head(copy):
    path = copy / "target_head.safetensors"
    flip(path, path.stat().st_size - 1)
    refused(copy, "target_head.safetensors: .*sealed with")


def test_an_unfinished_store(copy, extract_args, tmp_path):
    for name in ("shard-00004.safetensors", "sealed/shard-00004.json", "manifest.json"):
        (copy / name).unlink()
    extract(extract_args(copy, max_samples=1))  # rewrites the manifest; this data does not hold the lost samples
    refused(copy, "incomplete, .* of 24 records. Run the same `fledge extract` again")


def test_a_full_disk_keeps_what_is_written(store, extract_args, tmp_path):
    """A limit on file sizes stands in for the disk: the fourth shard is larger than it."""
    sizes = sorted(path.stat().st_size for path in store.glob("shard-*.safetensors"))
    limit = sizes[-1] - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"the disk \(or its quota\) is full. \d+ finished shards are kept"):
            extract(extract_args(tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = HiddenStore(tmp_path / "full", allow_incomplete=True)
    kept.verify()
    assert 0 < len(kept) < 24 and not list((tmp_path / "full").glob("*.writing"))
    extract(extract_args(tmp_path / "full"))
    assert tree_bytes(tmp_path / "full") == tree_bytes(store)


def test_no_room_is_refused_before_the_first_byte(extract_args, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"about 2.0 MiB are needed and 976.6 KiB are free.*--tap-storage fp8"):
        extract(extract_args(tmp_path / "full"))
    assert not list((tmp_path / "full").glob("*.safetensors"))


def test_inspect_verifies_and_shows(copy, tmp_path, capsys):
    from fledge.cli import run_command

    assert run_command("inspect", [str(copy), "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["complete"] and figures["counts"]["records"] == 24 and figures["length"]["max"] <= 120
    flip(copy / "shard-00000.safetensors", (copy / "shard-00000.safetensors").stat().st_size - 8)
    assert run_command("inspect", [str(copy)]) == 1
    assert "checksum" in capsys.readouterr().err
