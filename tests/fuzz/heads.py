"""Draft heads as folders: config.json and model.safetensors, read the way every command reads them."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_target
from torch import Tensor

from fledge.doctor.check import examine
from fledge.drafters.eagle3.checkpoint import WEIGHTS, load_draft, save_draft
from fledge.drafters.eagle3.config import from_json
from fledge.drafters.eagle3.foreign import read_any
from fledge.drafters.eagle3.head import read_head
from fledge.errors import UserError
from fuzz.documents import (
    NO_FLAG,
    NO_INT,
    NO_LIST,
    NO_NUMBER,
    NO_OBJECT,
    NO_SIZE,
    NO_TEXT,
    broken_fields,
    broken_text,
    encoded,
)  # fmt: skip
from fuzz.harness import Case, WrongValue

AREA = "draft heads"
LAYERS = 8  # of the tiny target
NO_TAPS = (
    *NO_LIST,
    [],
    [1],
    [1, 2, 3, 4],
    [-1, 2, 3],
    [1, 2, 99],
    ["1", 2, 3],
    [1.5, 2, 3],
    [True, 2, 3],
    [None, 2, 3],
)
NO_POSITIVE = (*NO_NUMBER, 0, -1)

WRONG_CONFIG: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("hidden_size",): (*NO_SIZE, 63, 128),
    ("intermediate_size",): (*NO_SIZE, 97),
    ("num_attention_heads",): (*NO_SIZE, 3),
    ("num_key_value_heads",): (*NO_SIZE, 3, 8),
    ("head_dim",): (*NO_INT, -16, 7, 32),
    ("vocab_size",): (*NO_SIZE, 127, 10**12),
    ("draft_vocab_size",): (*NO_INT, -1, 47, 129),
    ("rms_norm_eps",): (*NO_NUMBER, -1, -1e-6),
    ("max_position_embeddings",): NO_SIZE,
    ("hidden_act",): (*NO_TEXT, "nonsense", ""),
    ("rope_parameters",): (*NO_OBJECT, {"rope_type": "nonsense", "rope_theta": 1e4}, {"rope_type": 5}),
    ("rope_parameters", "rope_theta"): NO_POSITIVE,
    ("rope_parameters", "rope_type"): (*NO_TEXT, "nonsense"),
    ("rope_parameters", "factor"): NO_POSITIVE,
    ("eagle_aux_hidden_state_layer_ids",): NO_TAPS,
    ("fc_norm",): NO_FLAG,
    ("norm_output",): NO_FLAG,
    ("norm_before_residual",): NO_FLAG,
    ("sliding_window",): (*NO_INT, 0, -1),
    ("architectures",): (*NO_LIST, [5]),
    ("num_hidden_layers",): (*NO_INT, 0, 2, -1),
    ("fledge",): NO_OBJECT,
    ("fledge", "target_layers"): (*NO_INT, 0, -1, 2),
    ("fledge", "tap_convention"): (*NO_TEXT, "nonsense"),
}
REQUIRED = [("hidden_size",), ("intermediate_size",), ("num_attention_heads",), ("num_key_value_heads",),
            ("vocab_size",)]  # fmt: skip
FLOATING = ("fc.weight", "norm.weight", "lm_head.weight", "midlayer.self_attn.q_proj.weight",
            "midlayer.mlp.down_proj.weight")  # fmt: skip


def with_dtype(dtype: torch.dtype) -> Callable[[dict[str, Tensor], str], None]:
    def rule(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].to(dtype)

    return rule


def with_value(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def rule(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name].view(-1)[-1] = value

    return rule


BAD_WEIGHTS: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "integers": with_dtype(torch.int64),
    "bytes": with_dtype(torch.uint8),
    "booleans": with_dtype(torch.bool),
    "complex numbers": with_dtype(torch.complex64),
    "NaN": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "missing": lambda tensors, name: tensors.pop(name),
    "flat": lambda tensors, name: tensors.update({name: tensors[name].reshape(1, -1)}),
    "one row short": lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
    "empty": lambda tensors, name: tensors.update({name: tensors[name][:0].clone()}),
    "under another name": lambda tensors, name: tensors.update({f"other.{name}": tensors.pop(name)}),
}

BAD_VOCAB: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "d2t beyond the vocabulary": lambda tensors: tensors["d2t"].add_(1000),
    "d2t negative": lambda tensors: tensors["d2t"].sub_(1000),
    "d2t names a token twice": lambda tensors: tensors["d2t"].__setitem__(1, tensors["d2t"][0] - 1),
    "d2t of real numbers": lambda tensors: tensors.update(d2t=tensors["d2t"].float() + 0.5),
    "d2t of booleans": lambda tensors: tensors.update(d2t=tensors["d2t"].bool()),
    "d2t too short": lambda tensors: tensors.update(d2t=tensors["d2t"][:-1].clone()),
    "d2t of two dimensions": lambda tensors: tensors.update(d2t=tensors["d2t"][None].clone()),
    "t2d inverted": lambda tensors: tensors.update(t2d=~tensors["t2d"]),
    "t2d all false": lambda tensors: tensors.update(t2d=torch.zeros_like(tensors["t2d"])),
    "t2d too long": lambda tensors: tensors.update(t2d=torch.cat([tensors["t2d"], tensors["t2d"][:1]])),
    "t2d of complex numbers": lambda tensors: tensors.update(t2d=tensors["t2d"].to(torch.complex64)),
}


def other_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A safetensors file with a changed header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


BAD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"\0",
    "its length without end": lambda content: b"\xff" * 8 + content[8:],
    "its length zero": lambda content: bytes(8) + content[8:],
    "header is no JSON": lambda content: content[:8] + b"x" + content[9:],
    "header nested": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "JSON": lambda content: b'{"fc.weight": [1, 2]}',
    "zeros": lambda content: bytes(len(content)),
    "pickle": lambda content: b"\x80\x04\x95\x10" + bytes(64),
    "unknown dtype": lambda content: other_header(content, lambda h: h["norm.weight"].update(dtype="F13")),
    "negative shape": lambda content: other_header(content, lambda h: h["norm.weight"].update(shape=[-64])),
    "huge shape": lambda content: other_header(content, lambda h: h["norm.weight"].update(shape=[2**62])),
    "overlapping tensors": lambda content: other_header(
        content, lambda h: h["norm.weight"].update(data_offsets=h["fc.weight"]["data_offsets"])),
}  # fmt: skip


@functools.cache
def good_head() -> Path:
    """A head of the tiny Llama; its config states everything that a rule changes."""
    folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-head-"))
    save_draft(tiny_draft(tiny_target("llama")), folder, dtype=torch.float32)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    del document["eagle_config"]  # states the tap layers once more
    document |= {"norm_before_residual": False, "sliding_window": 64,
                "layer_types": ["sliding_attention"], "use_sliding_window": True}  # fmt: skip
    path.write_text(json.dumps(document))
    return folder


def decode(folder: Path) -> Any:
    return load_draft(folder, tiny_target("llama").embedding_weight).config


def inspect(folder: Path) -> Any:
    seen = examine(folder, tiny_target("llama").text_config)
    if said := [finding for finding in seen.findings if finding.severity == "error" or finding.topic == "vocab"]:
        raise UserError(str(said[0]))
    return seen.head.config


READERS: dict[str, Callable[[Path], Any]] = {
    "decode": decode,
    "export": lambda folder: read_head(folder).config,
    "train": lambda folder: read_any(folder, num_target_layers=LAYERS).config,
    "inspect": inspect,
}


def case(rule: str | None, reader: str, change: Callable[[Path], Any], expected: dict[str, Any] | None = None) -> Case:
    def act(folder: Path) -> None:
        head = shutil.copytree(good_head(), folder / "head")
        change(head)
        config = READERS[reader](head)
        for name, value in (expected or {}).items():
            if getattr(config, name) != value:
                raise WrongValue(f"{name} is {getattr(config, name)!r}, not {value!r}")

    return Case(AREA, rule and f"{rule}, {reader}", act, shown=f"a head read by {reader}")


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(head: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(head / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, head / WEIGHTS)

    return apply


def write_config(content: bytes) -> Callable[[Path], int]:
    return lambda head: (head / "config.json").write_bytes(content)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A good head, whole or with one thing changed, and a command's reader."""
    reader = draw(st.sampled_from(list(READERS)))
    document = json.loads((good_head() / "config.json").read_text())
    kind = draw(st.sampled_from(["valid", "field", "field", "field", "text", "weight", "weight", "vocab", "file"]))
    if kind == "valid":
        known = from_json(good_head() / "config.json")
        eps = draw(st.sampled_from([1e-6, 1e-5, 0.001]))
        content = encoded({**document, "rms_norm_eps": eps, draw(st.sampled_from(["note", "é"])): "x"})
        return case(None, reader, write_config(content), {"rms_norm_eps": eps, "tap_layers": known.tap_layers})
    if kind == "field":
        rule, broken = draw(broken_fields(document, WRONG_CONFIG, REQUIRED))
        return case(f"config.json: {rule}", reader, write_config(encoded(broken)))
    if kind == "text":
        rule, content = draw(broken_text(encoded(document)))
        return case(f"config.json: {rule}", reader, write_config(content))
    if kind == "weight":
        rule, name = draw(st.sampled_from(list(BAD_WEIGHTS))), draw(st.sampled_from(FLOATING))
        return case(f"{name}: {rule}", reader, rewrite(lambda tensors: BAD_WEIGHTS[rule](tensors, name)))
    if kind == "vocab":
        rule = draw(st.sampled_from(list(BAD_VOCAB)))
        return case(f"vocabulary: {rule}", reader, rewrite(BAD_VOCAB[rule]))
    rule = draw(st.sampled_from([*BAD_FILES, "not there"]))
    if rule == "not there":
        return case("weights: not there", reader, lambda head: (head / WEIGHTS).unlink())
    content = BAD_FILES[rule]((good_head() / WEIGHTS).read_bytes())
    return case(f"weights: {rule}", reader, lambda head: (head / WEIGHTS).write_bytes(content))
