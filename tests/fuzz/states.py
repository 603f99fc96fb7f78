"""Hidden states from a server: what it answers, the path it names, the file that lies there.

The server may neither make the client read or delete a file that is not its answer, nor give it states that are not
those of the prompt.
"""

import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from saved_target import save_target
from torch import Tensor

from fledge.data.samples import Sample
from fledge.data.tokenize import ChatTemplate
from fledge.servers.hidden_states import EngineTarget
from fuzz.documents import NO_OBJECT, NO_TEXT, broken_fields, broken_text, encoded
from fuzz.harness import Case, WrongValue
from fuzz.replies_server import COMPLETIONS, MODELS, Endless, Reply, server
from fuzz.servers import MODEL_LIST

AREA = "hidden states of a server"
FOLDER = Path("/dev/shm/fledge")  # what client and server agree on unless told otherwise
IDS = [5, 6, 7, 8]
LAYERS, HIDDEN = 4, 64  # three taps and the last, of the tiny Llama
Tensors = dict[str, Tensor]
NUMBERS = itertools.count()
OURS = f"fuzz-{os.getpid()}-"  # others may use the folder, too

WRONG_REPLY: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("kv_transfer_params",): (*NO_OBJECT, None),
    ("kv_transfer_params", "hidden_states_path"): (
        *NO_TEXT,
        None,
        "",
        " ",
        "x" * 10_000,
        "a\0b",
        ".",
        "/",
        "/dev/zero",
        "\ud800",
    ),  # fmt: skip
}
REQUIRED = [("kv_transfer_params",), ("kv_transfer_params", "hidden_states_path")]
BAD_TENSORS: dict[str, Callable[[Tensors], Any]] = {
    "states of other tokens": lambda t: t["token_ids"].add_(1),
    "states of fewer tokens": lambda t: t.update(token_ids=t["token_ids"][:-1].clone()),
    "token ids of real numbers": lambda t: t.update(token_ids=t["token_ids"].float()),
    "token ids of two dimensions": lambda t: t.update(token_ids=t["token_ids"][None].clone()),
    "token ids missing": lambda t: t.pop("token_ids"),
    "states missing": lambda t: t.pop("hidden_states"),
    "a row of states short": lambda t: t.update(hidden_states=t["hidden_states"][:-1].clone()),
    "a row of states too many": lambda t: t.update(hidden_states=t["hidden_states"][[0, 1, 2, 3, 3]].clone()),
    "a layer short": lambda t: t.update(hidden_states=t["hidden_states"][:, :-1].clone()),
    "another width": lambda t: t.update(hidden_states=t["hidden_states"][..., :-1].clone()),
    "two dimensions": lambda t: t.update(hidden_states=t["hidden_states"].flatten(1).clone()),
    "NaN": lambda t: t["hidden_states"].fill_(float("nan")),
    "infinity": lambda t: t["hidden_states"][0, 0].fill_(float("inf")),
    "integers": lambda t: t.update(hidden_states=t["hidden_states"].long()),
    "booleans": lambda t: t.update(hidden_states=t["hidden_states"].bool()),
    "complex numbers": lambda t: t.update(hidden_states=t["hidden_states"].to(torch.complex64)),
}
BAD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "an empty file": lambda content: b"",
    "a cut file": lambda content: content[: len(content) // 2],
    "a file with a byte too many": lambda content: content + b"x",
    "zeros": lambda content: bytes(len(content)),
    "a header without end": lambda content: b"\xff" * 8 + content[8:],
    "a nested header": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a pickle": lambda content: b"\x80\x04\x95" + content,
}


@functools.cache
def target() -> Path:
    return save_target(Path(tempfile.mkdtemp(prefix="fledge-fuzz-target-")) / "target")


@functools.cache
def template() -> ChatTemplate:
    return ChatTemplate.from_pretrained(str(target()))


@functools.cache
def source() -> Any:
    """The client, opened once: it reads the target's two ends from its files."""
    server().answers = {MODELS: Reply.of(MODEL_LIST)}
    return EngineTarget.open(str(target()), [server().url]).source


def states() -> Tensors:
    return {"hidden_states": torch.ones(len(IDS), LAYERS, HIDDEN), "token_ids": torch.tensor(IDS)}


def write(folder: Path, asked: dict[str, Any], tensors: Tensors, spoil: Callable[[bytes], bytes] | None) -> Path:
    """A file as vLLM writes it: its name holds the id of the request."""
    path = folder / f"{OURS}{asked.get('request_id', next(NUMBERS))}-0.safetensors"
    save_file(tensors, path)
    if spoil is not None:
        path.write_bytes(spoil(path.read_bytes()))
    return path


def case(rule: str | None, answer: Callable[[Path, dict[str, Any]], Reply]) -> Case:
    """`answer` gets the case's folder, in which a file lies that is none of the server's."""

    def act(folder: Path) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        kept = folder / "kept.safetensors"
        save_file(states(), kept)
        client = source()
        server().answers = {MODELS: Reply.of(MODEL_LIST), COMPLETIONS: lambda asked: answer(folder, asked)}
        sample = Sample("one", torch.tensor(IDS), torch.ones(len(IDS), dtype=torch.bool))
        try:
            record = client.record(sample)
        finally:
            for path in FOLDER.glob(f"{OURS}*"):
                path.unlink()
            if not kept.exists():
                raise WrongValue("a file that is none of the server's was deleted")
        if rule is None and not (record.tap_hidden == 1).all():
            raise WrongValue("other states than the server wrote")

    return Case(AREA, rule, act, shown=rule or "")


def named(path: Path | str) -> Reply:
    return Reply.of({"choices": [{}], "kv_transfer_params": {"hidden_states_path": str(path)}})


def link(folder: Path, asked: dict[str, Any]) -> Path:
    path = FOLDER / f"{OURS}{asked.get('request_id', next(NUMBERS))}-0.safetensors"
    path.symlink_to(folder / "kept.safetensors")
    return path


def of_another(folder: Path, asked: dict[str, Any]) -> Path:
    path = FOLDER / f"{OURS}of-another-request-0.safetensors"
    save_file(states(), path)
    return path


def pipe(folder: Path, asked: dict[str, Any]) -> Path:
    path = FOLDER / f"{OURS}{asked.get('request_id', next(NUMBERS))}-0.safetensors"
    os.mkfifo(path)
    return path


BAD_PATHS: dict[str, Callable[[Path, dict[str, Any]], Path | str]] = {
    "a file outside the agreed folder": lambda folder, asked: folder / "kept.safetensors",
    "a way out of the agreed folder": lambda folder, asked: os.path.join(
        FOLDER, os.path.relpath(folder / "kept.safetensors", FOLDER)),
    "a link to a file outside": link,
    "a pipe": pipe,
    "a folder": lambda folder, asked: folder,
    "a file that is not there": lambda folder, asked: FOLDER / "absent.safetensors",
    "a system file": lambda folder, asked: "/etc/passwd",
    "the file of another request": of_another,
    "a URL": lambda folder, asked: "http://127.0.0.1/x.safetensors",
}  # fmt: skip
GOOD_REPLY = {"choices": [{}], "kv_transfer_params": {"hidden_states_path": "PATH"}}
BAD_HTTP = {
    "a reply without end": Reply(Endless(b" ")),
    "status 500": Reply([b"\xff out of memory"], status=500),
    "a page": Reply([b"<html></html>"]),
    "a redirect to another host": Reply(status=302, headers={"Location": "http://localhost:1/elsewhere"}),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A server's answer that is right, or wrong in one respect."""
    source()
    kind = draw(st.sampled_from(["valid", "field", "field", "text", "tensors", "tensors", "file", "path", "http"]))
    if kind == "valid":
        more = draw(st.sampled_from([{}, {"extra": torch.zeros(1)}]))
        return case(None, lambda _, asked: named(write(FOLDER, asked, states() | more, None)))
    if kind == "field":
        rule, document = draw(broken_fields(GOOD_REPLY, WRONG_REPLY, REQUIRED))
        return case(f"reply: {rule}", lambda *_: Reply.of(document))
    if kind == "text":
        rule, content = draw(broken_text(encoded(GOOD_REPLY)))
        return case(f"reply: {rule}", lambda *_: Reply([content]))
    if kind == "path":
        name = draw(st.sampled_from(list(BAD_PATHS)))
        return case(f"path: {name}", lambda folder, asked: named(BAD_PATHS[name](folder, asked)))
    if kind == "http":
        name = draw(st.sampled_from(list(BAD_HTTP)))
        return case(name, lambda *_: BAD_HTTP[name])
    if kind == "file":
        name = draw(st.sampled_from(list(BAD_FILES)))
        return case(f"file: {name}", lambda _, asked: named(write(FOLDER, asked, states(), BAD_FILES[name])))
    name = draw(st.sampled_from(list(BAD_TENSORS)))

    def spoilt(_: Path, asked: dict[str, Any]) -> Reply:
        tensors = states()
        BAD_TENSORS[name](tensors)
        return named(write(FOLDER, asked, tensors, None))

    return case(f"file: {name}", spoilt)
