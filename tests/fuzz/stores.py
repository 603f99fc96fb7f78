"""Stores of hidden states: bytes that changed, files that are gone, and a manifest that says something else.

A store that `fledge extract` wrote is read whole, as training does; every byte of it counts.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from saved_target import equal_records, write_conversations

from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.manifest import canonical
from fledge.storage.states.reader import HiddenStore
from fuzz.documents import NO_INT, NO_LIST, NO_OBJECT, NO_SIZE, NO_TEXT, broken_fields, broken_text
from fuzz.harness import Case, WrongValue
from fuzz.states import target

AREA = "hidden-state stores"
SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")
FILES = (*SHARDS, "manifest.json", "target_head.safetensors")
NO_DIGEST = (*NO_TEXT, "", "0" * 64, "x")

# The manifest with a checksum that fits: someone else's, or edited with care.
WRONG_MANIFEST: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("kind",): (*NO_TEXT, "other"),
    ("format",): (*NO_INT, 0, 2, 99),
    ("identity",): NO_OBJECT,
    ("identity", "hidden_size"): (*NO_SIZE, 32, 128),
    ("identity", "vocab_size"): (*NO_SIZE, 5),
    ("identity", "tap_layers"): (*NO_LIST, [], [1], [-1, 2, 3], ["1", 2, 3], [1.5, 2, 3]),
    ("identity", "dtype"): (*NO_TEXT, "float16", "nonsense", "", "__class__"),
    ("identity", "tap_storage"): (*NO_TEXT, "nonsense", "fp8"),
    ("identity", "last_storage"): (*NO_TEXT, "nonsense"),
    ("identity", "text_config"): NO_OBJECT,
    ("identity", "max_length"): (*NO_SIZE,),
    ("identity", "stop_token_ids"): (*NO_LIST, ["x"], [-1]),
    ("identity", "target"): NO_TEXT,
    ("identity", "tokenizer"): NO_TEXT,
    ("counts",): NO_OBJECT,
    ("counts", "planned_records"): (*NO_INT, 0, -1, 10**6),
    ("counts", "tokens"): (*NO_INT, -1, 10**6),
    ("head", "bytes"): (*NO_INT, 0, -1),
    ("head", "sha256"): NO_DIGEST,
    ("plan", "sha256"): NO_TEXT,
    ("shards",): (*NO_LIST, [], [5]),
    ("shards", 0): (*NO_LIST, []),
    ("shards", 0, "file"): (*NO_TEXT, "", "../x", "/etc/passwd", "absent", "a\0b", "manifest.json"),
    ("shards", 0, "bytes"): (*NO_INT, 0, -1),
    ("shards", 0, "records"): (*NO_INT, 0, -1, 99),
    ("shards", 0, "tokens"): (*NO_INT, 0, -1, 99),
    ("shards", 0, "supervised"): (*NO_INT, -1, 10**6),
    ("shards", 0, "longest"): (*NO_INT, 0, -1, 10**6),
    ("shards", 0, "sha256"): NO_DIGEST,
}
REQUIRED = [("kind",), ("format",), ("identity",), ("identity", "hidden_size"), ("counts",), ("plan",), ("head",),
            ("shards",), ("shards", 0, "file"), ("shards", 0, "sha256"), ("head", "sha256")]  # fmt: skip


@functools.cache
def good_store() -> Path:
    """A store of two shards."""
    folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-store-"))
    data = write_conversations(folder / "talk.jsonl", 8)
    extract(ExtractSettings(target=str(target()), data=[str(data)], output_dir=folder / "store",
                        model_max_length=60, shard_mb=0.2))  # fmt: skip
    return folder / "store"


def read_all(folder: Path) -> HiddenStore:
    """What a training run does: open everything, load the head, count the tokens, read every record."""
    store = HiddenStore(folder)
    store.head(torch.device("cpu"))
    store.counts()
    for index in range(len(store)):
        store[index]
    return store


def inspected(folder: Path) -> HiddenStore:
    """What `fledge inspect` does besides: hash the shards. Training reads every byte under a checksum per record."""
    store = read_all(folder)
    store.verify()
    return store


def case(rule: str | None, change: Callable[[Path], Any], read: Callable[[Path], HiddenStore] = read_all) -> Case:
    def act(folder: Path) -> None:
        copy = shutil.copytree(good_store(), folder / "store")
        change(copy)
        store, good = read(copy), HiddenStore(good_store())
        if store.ids != good.ids or not all(equal_records(store[i], good[i]) for i in range(len(good))):
            raise WrongValue("other records than were written")

    return Case(AREA, rule, act, shown=rule or "")


def flip(name: str, place: float, bit: int) -> Callable[[Path], None]:
    """Turn one bit of a file, at a share of its length."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        (folder / name).write_bytes(content)

    return change


def resize(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


SIZES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content.rstrip()[:-1],
    "a byte too long": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A store as written, or with one thing changed."""
    kind = draw(st.sampled_from(["valid", "flip", "flip", "flip", "size", "gone", "text", "field", "field", "swap"]))
    name = draw(st.sampled_from(FILES))
    if kind == "valid":
        note = draw(st.text("abc", max_size=8))
        return case(None, lambda folder: (folder / f"note-{note}.txt").write_text("mine"))
    if kind == "flip":
        place, bit = draw(st.floats(0, 1)), draw(st.integers(0, 7))
        return case(f"{name}: a bit turned", flip(name, place, bit))
    if kind == "size":
        rule = draw(st.sampled_from(list(SIZES)))
        return case(f"{name}: {rule}", resize(name, SIZES[rule]))
    if kind == "gone":
        return case(f"{name}: not there", lambda folder: (folder / name).unlink())
    if kind == "swap":
        return case("shards exchanged", lambda folder: shutil.copyfile(folder / SHARDS[0], folder / SHARDS[1]))
    text = (good_store() / "manifest.json").read_bytes()
    if kind == "text":
        rule, content = draw(broken_text(text, leave_out=("only blanks",)))
        return case(f"manifest.json: {rule}", lambda folder: (folder / "manifest.json").write_bytes(content))
    rule, document = draw(broken_fields(json.loads(text), WRONG_MANIFEST, REQUIRED))
    document.pop("checksum", None)
    sound = {**document, "checksum": hashlib.sha256(canonical(document)).hexdigest()}
    read = inspected if "shards.0.sha256" in rule else read_all
    return case(f"manifest.json: {rule}", lambda folder: (folder / "manifest.json").write_text(json.dumps(sound)), read)
