"""Whatever happens to a store's files is found before anything is trained on it: one line, with the remedy."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from saved_target import save_target, tree_bytes

from fledge.errors import UserError
from fledge.target.extract import extract
from fledge.target.store.manifest import read_manifest
from fledge.target.store.reader import HiddenStore


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


def test_a_truncated_shard(copy):
    path = copy / "shard-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    refused(copy, r"shard-00002.*bytes, the manifest says.*only this shard is made anew")


def test_a_missing_shard(copy):
    (copy / "shard-00003.safetensors").unlink()
    refused(copy, r"shard-00003.safetensors: missing; the manifest lists it")


def test_a_damaged_header(copy):
    flip(copy / "shard-00000.safetensors", 9)
    refused(copy, "header is damaged|with other settings|another target")


@pytest.mark.parametrize(
    "changes",
    [{"target": "another"}, {"template_fingerprint": "0" * 64}, {"dtype": "bfloat16"}, {"tap_layers": [0, 1, 2]}],
)
def test_a_manifest_of_other_states(copy, changes):
    restate(copy, **changes)
    refused(copy, "made with another target, template, dtype or other settings")


def test_a_manifest_of_another_target(copy, extract_args, tmp_path):
    other = save_target(tmp_path / "other", seed=5)
    extract(extract_args(tmp_path / "store", model_name=str(other), max_samples=9))
    shutil.copy(tmp_path / "store" / "manifest.json", copy / "manifest.json")
    refused(copy, "made with another target|incomplete|bytes, the manifest says")


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "hidden_store"}'])
def test_an_unreadable_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    refused(copy, "not a readable manifest.*rebuilt from the finished shards")


def test_an_edited_manifest(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"'))
    refused(copy, "edited or damaged")


def test_a_damaged_head(copy):
    path = copy / "target_head.safetensors"
    flip(path, path.stat().st_size - 1)
    refused(copy, "target_head.safetensors: its size or checksum")


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
