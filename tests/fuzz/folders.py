"""Folders that are made once and read again: AngelSlim's states, tokenised data, training checkpoints."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from saved_target import write_conversations

from fledge.data.dataset import TokenizedData
from fledge.storage.angelslim import VOCAB_FILE, AngelSlimFolder, read_vocab_mapping
from fledge.train.resume import check_same_run, find_checkpoint
from fuzz.documents import broken_text
from fuzz.harness import Case, WrongValue
from fuzz.states import template

AREA = "folders read again"
TOKENS, TAPS, HIDDEN, VOCAB = 5, 3, 8, 32
Saved = dict[str, Any]


def ckpt() -> Saved:
    return {
        "input_ids": torch.arange(4, 4 + TOKENS)[None], "loss_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "hidden_states": torch.ones(1, TOKENS, TAPS * HIDDEN), "target_hiddens": torch.ones(1, TOKENS, HIDDEN),
    }  # fmt: skip


def vocab() -> Saved:
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[:16] = True
    return {"d2t": torch.zeros(16, dtype=torch.int64), "t2d": t2d}


def put(name: str, value: Any) -> Callable[[Saved], Any]:
    return lambda saved: saved.update({name: value})


BAD_CKPT: dict[str, Callable[[Saved], Any]] = {
    **{f"{name} missing": (lambda saved, name=name: saved.pop(name)) for name in ckpt()},
    **{f"{name} is a list": put(name, [1, 2]) for name in ckpt()},
    **{f"{name} is None": put(name, None) for name in ckpt()},
    "token ids negative": put("input_ids", -torch.ones(1, TOKENS, dtype=torch.int64)),
    "token ids beyond the vocabulary": put("input_ids", torch.full((1, TOKENS), VOCAB)),
    "token ids of real numbers": put("input_ids", torch.full((1, TOKENS), 4.5)),
    "token ids complex": put("input_ids", torch.ones(1, TOKENS, dtype=torch.complex64)),
    "a scalar for token ids": put("input_ids", torch.tensor(5)),
    "no tokens": put("input_ids", torch.zeros(1, 0, dtype=torch.int64)),
    "mask too short": put("loss_mask", torch.ones(1, TOKENS - 1)),
    "mask of 2": put("loss_mask", torch.full((1, TOKENS), 2)),
    "mask of NaN": put("loss_mask", torch.full((1, TOKENS), float("nan"))),
    "states NaN": put("hidden_states", torch.full((1, TOKENS, TAPS * HIDDEN), float("nan"))),
    "last states infinite": put("target_hiddens", torch.full((1, TOKENS, HIDDEN), float("inf"))),
    "states of integers": put("hidden_states", torch.ones(1, TOKENS, TAPS * HIDDEN, dtype=torch.int64)),
    "states of booleans": put("target_hiddens", torch.ones(1, TOKENS, HIDDEN, dtype=torch.bool)),
    "states complex": put("hidden_states", torch.ones(1, TOKENS, TAPS * HIDDEN, dtype=torch.complex64)),
    "states too narrow": put("hidden_states", torch.ones(1, TOKENS, HIDDEN)),
    "states too short": put("hidden_states", torch.ones(1, TOKENS - 1, TAPS * HIDDEN)),
    "positions are text": put("position_ids", "x"),
    "positions too short": put("position_ids", torch.arange(TOKENS - 1)),
    "positions of real numbers": put("position_ids", torch.full((TOKENS,), 0.5)),
    "positions negative": put("position_ids", -torch.ones(TOKENS, dtype=torch.int64)),
}
BAD_MAPPING: dict[str, Callable[[Saved], Any]] = {
    "d2t missing": lambda saved: saved.pop("d2t"),
    "t2d missing": lambda saved: saved.pop("t2d"),
    "d2t is a list": put("d2t", [0] * 16),
    "d2t beyond the vocabulary": put("d2t", torch.full((16,), 1000)),
    "d2t of real numbers": put("d2t", torch.full((16,), 0.5)),
    "d2t of two dimensions": put("d2t", torch.zeros(4, 4, dtype=torch.int64)),
    "t2d of another size": put("t2d", torch.ones(VOCAB + 1, dtype=torch.bool)),
    "t2d of other tokens": put("t2d", torch.arange(VOCAB) >= 16),
    "t2d of real numbers": put("t2d", torch.full((VOCAB,), 0.5)),
}
BAD_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "text": lambda content: b"not a checkpoint",
    "zeros": lambda content: bytes(len(content)),
}


class Calls:
    """Pickled, it would run a function when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def angelslim(rule: str | None, saved: Any, mapping: Any, spoil: Callable[[Path], Any] | None = None) -> Case:
    def act(folder: Path) -> None:
        (folder / "rows").mkdir()
        torch.save(saved, folder / "rows" / "data_0.ckpt")
        torch.save(mapping, folder / VOCAB_FILE)
        if spoil is not None:
            spoil(folder)
        states = AngelSlimFolder(folder, HIDDEN, TAPS)
        counts, ids = states.counts(range(len(states)), VOCAB), read_vocab_mapping(folder, VOCAB)
        record = states[0]
        if (folder / "ran").exists():
            raise WrongValue("code in the file was run")
        if rule is None and (int(counts.sum()), record.input_ids.tolist()) != (3, [4, 5, 6, 7, 8]):
            raise WrongValue(f"{record}")
        assert ids is not None

    return Case(AREA, rule and f"AngelSlim: {rule}", act, shown=rule or "")


@functools.cache
def cache() -> Path:
    """Tokenised data as a run leaves it, with the conversations."""
    folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-cache-"))
    write_conversations(folder / "talk.jsonl", 6)
    TokenizedData.from_path(str(folder / "talk.jsonl"), template(), cache_dir=folder / "cache")
    return folder


FILES = ("offsets.npy", "truncated.npy", "cut.npy", "ids.json", "tokens.bin", "mask.bin", "report.json")
RESIZED: dict[str, Callable[[bytes], bytes]] = {
    **BAD_BYTES,
    "last bytes missing": lambda content: content.rstrip()[:-4],
    "twice": lambda content: content + content,
}


def tokenised(rule: str | None, change: Callable[[Path], Any]) -> Case:
    """A damaged cache is refused or made again; what is read is what the conversations say."""

    def act(folder: Path) -> None:
        copy = shutil.copytree(cache(), folder / "copy")
        inner = next(path for path in (copy / "cache").iterdir() if path.is_dir())
        change(inner)
        good = TokenizedData.from_path(str(cache() / "talk.jsonl"), template(), cache_dir=cache() / "cache")
        data = TokenizedData.from_path(str(copy / "talk.jsonl"), template(), cache_dir=copy / "cache")
        same = [(a.id, a.input_ids.tolist(), a.loss_mask.tolist()) for a in data] == [
            (a.id, a.input_ids.tolist(), a.loss_mask.tolist()) for a in good]  # fmt: skip
        if not same:
            raise WrongValue("other samples than the conversations say")
        if rule is not None:
            raise OSError("made again")

    return Case(AREA, rule and f"tokenised data: {rule}", act, shown=rule or "")


def checkpoint(rule: str, state: bytes | None, config: bytes | None) -> Case:
    """A run's folder that cannot be continued: refused, or its broken checkpoint passed over."""

    def act(folder: Path) -> None:
        step = folder / "checkpoint-5"
        step.mkdir()
        (step / "model.safetensors").write_bytes(b"x")
        (step / "trainer_state.json").write_bytes(b'{"global_step": 5}' if state is None else state)
        (folder / "train_config.json").write_bytes(b'{"seed": 1, "ttt_steps": 3}' if config is None else config)
        found = find_checkpoint(folder, "auto")
        if found is None:
            raise OSError("passed over")
        check_same_run(folder, {"seed": 1, "ttt_steps": 3}, resuming=True)

    return Case(AREA, f"checkpoint: {rule}", act, shown=rule)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A folder as it was written, or with one thing changed."""
    cache()
    kind = draw(st.sampled_from(["valid", "ckpt", "ckpt", "mapping", "bytes", "cache", "cache", "state", "config"]))
    saved, mapping = ckpt(), vocab()
    if kind == "valid":
        saved["note"] = draw(st.text(max_size=5))
        return angelslim(None, saved, mapping) if draw(st.booleans()) else tokenised(None, lambda inner: None)
    if kind in ("ckpt", "mapping"):
        rules = BAD_CKPT if kind == "ckpt" else BAD_MAPPING
        rule = draw(st.sampled_from([*rules, "is a list", "holds code"]))
        broken = saved if kind == "ckpt" else mapping
        if rule in rules:
            rules[rule](broken)
        other: Any = {"is a list": [1], "holds code": {**broken, "x": Calls()}}.get(rule, broken)
        pair = (other, mapping) if kind == "ckpt" else (saved, other)
        return angelslim(f"{kind} {rule}", *pair)
    if kind == "bytes":
        rule, name = draw(st.sampled_from(list(BAD_BYTES))), draw(st.sampled_from(["rows/data_0.ckpt", VOCAB_FILE]))
        return angelslim(f"{name} {rule}", saved, mapping, lambda folder: (folder / name).write_bytes(
            BAD_BYTES[rule]((folder / name).read_bytes())))  # fmt: skip
    if kind == "cache":
        rule, name = draw(st.sampled_from([*RESIZED, "not there"])), draw(st.sampled_from(FILES))
        if rule == "not there":
            return tokenised(f"{name} not there", lambda inner: (inner / name).unlink())
        return tokenised(f"{name} {rule}", lambda inner: (inner / name).write_bytes(
            RESIZED[rule]((inner / name).read_bytes())))  # fmt: skip
    rule, content = draw(broken_text(json.dumps({"global_step": 5, "epoch": 1.0, "log": "x", "more": "y"}).encode()))
    return checkpoint(f"{kind} {rule}", *((content, None) if kind == "state" else (None, content)))
