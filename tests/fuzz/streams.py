"""What measured servers answer: streamed completions, model lists and metrics, as `fledge bench` reads them.

A malformed answer may stop the benchmark with one line or leave its question out; it never gives a figure.
"""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.documents import NO_COUNT, NO_LIST, NO_OBJECT, NO_TEXT, broken_fields, broken_text, encoded
from fuzz.harness import Case, WrongValue
from fuzz.replies_server import CHAT, METRICS, MODELS, Endless, Reply, server
from fuzz.rows import TEXT
from fuzz.stages import run_through

AREA = "streamed replies"
MODEL_LIST = {"object": "list", "data": [{"id": "target"}]}
PIECE = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

WRONG_PIECE: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("choices",): (*NO_LIST, [5], [None], [[]]),
    ("choices", 0, "delta"): (*NO_OBJECT, 5),
    ("choices", 0, "delta", "content"): (*NO_TEXT, "a\ud800b"),
    ("choices", 0, "finish_reason"): (*NO_TEXT, {"a": 1}),
}
WRONG_USAGE: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("usage",): (*NO_OBJECT, None),
    ("usage", "completion_tokens"): (*NO_COUNT, None),
}
BAD_LINES: dict[str, bytes] = {
    "JSON cut": b'data: {"choices": [{"del\n\n',
    "no JSON": b"data: nonsense\n\n",
    "not UTF-8": b'data: {"choices": "\xff\xfe"}\n\n',
    "nested too deeply": b"data: " + b"[" * 100_000 + b"\n\n",
    "a number": b"data: 5\n\n",
    "a list": b"data: [1]\n\n",
    "null": b"data: null\n\n",
    "an error": b'data: {"error": {"message": "out of memory"}}\n\n',
    "an error that is text": b'data: {"error": "out of memory"}\n\n',
    "a number of 5000 digits": b'data: {"usage": ' + b"9" * 5000 + b"}\n\n",
}
BAD_STREAMS: dict[str, Reply] = {
    "a line without end": Reply(Endless(b"data: xx")),
    "lines without end": Reply(Endless(b"data: " + encoded(PIECE) + b"\n\n")),
    "empty lines without end": Reply(Endless(b"\n")),
    "nothing": Reply(),
    "a redirect to another host": Reply(status=307, headers={"Location": "http://localhost:PORT/elsewhere"}),
    "a page": Reply([b"<html>busy</html>"], headers={"Content-Type": "text/html"}),
    "status 500": Reply([b"out of memory"], status=500),
    "status 400 not UTF-8": Reply([b"\xff\xfe\x1b[2J"], status=400),
    "a length that is not sent": Reply([b"data: {}\n\n"], headers={"Content-Length": "100000"}),
}
BAD_METRICS: dict[str, bytes] = {
    "NaN": b"vllm:spec_decode_num_drafts_total NaN\nvllm:spec_decode_num_accepted_tokens_total 5\n",
    "infinity": b"vllm:spec_decode_num_drafts_total +Inf\n",
    "text for a number": b"vllm:spec_decode_num_drafts_total many\n",
    "a position of 5000 digits": (
        b'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="' + b"9" * 5000 + b'"} 1\n'
    ),
    "a negative count": b"vllm:spec_decode_num_drafts_total -5\n",
    "not UTF-8": b"vllm:spec_decode_num_drafts_total \xff\xfe 5\n",
    "a number of 5000 digits": b"vllm:spec_decode_num_drafts_total " + b"9" * 5000 + b"\n",
}  # fmt: skip


def stream(*events: bytes | dict[str, Any]) -> Reply:
    """A streamed completion."""
    lines = [event if isinstance(event, bytes) else b"data: " + encoded(event) + b"\n\n" for event in events]
    return Reply([*lines, b"data: [DONE]\n\n"], headers={"Content-Type": "text/event-stream"})


def measured(folder: Path) -> list[dict[str, Any]]:
    """Run the benchmark of one question against the server; the rows that it wrote."""
    (folder / "questions.jsonl").write_text('{"question_id": "1", "turns": ["hello"]}\n')
    words = ["--base_model_path", "target", "--mode", "eagle", "--backend", "server", "--eagle_url", server().url,
             "--bench_name", "questions.jsonl", "--output_dir", "out", "--no_metrics"]  # fmt: skip
    run_through("bench", words)
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def case(rule: str | None, chat: Reply, models: Reply | None = None, metrics: bytes = b"", text: str = "") -> Case:
    def act(folder: Path) -> None:
        server().answers = {
            MODELS: models or Reply.of(MODEL_LIST), CHAT: chat, METRICS: Reply([metrics]), "/elsewhere": good("x"),
        }  # fmt: skip
        answers = [turn for row in measured(folder) for turns in row["answers"].values() for turn in turns]
        if rule is None and [(turn["text"], turn["num_tokens"]) for turn in answers] != [(text, 2)]:
            raise WrongValue(f"{answers!r}")
        if rule is not None and not answers:
            raise OSError("left out")

    return Case(AREA, rule, act, shown=str(chat.pieces)[:300])


def metrics_case(rule: str, metrics: bytes) -> Case:
    """Metrics that cannot be are left out, or stop the benchmark."""

    def act(folder: Path) -> None:
        server().answers = {MODELS: Reply.of(MODEL_LIST), CHAT: good("x"), METRICS: Reply([metrics])}
        found = [value for row in measured(folder) for value in row["metrics"].values()]
        if not any(found):
            raise OSError("left out")

    return Case(AREA, f"metrics: {rule}", act, shown=repr(metrics[:200]))


def good(text: str) -> Reply:
    piece = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return stream({"choices": [{"delta": {"role": "assistant"}}]}, piece, LAST, USAGE)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A stream that is right or wrong in one event."""
    kind = draw(st.sampled_from(["valid", "piece", "piece", "usage", "line", "stream", "metrics", "models"]))
    if kind == "valid":
        text = draw(TEXT)
        return case(None, good(text), text=text)
    if kind == "piece":
        rule, event = draw(broken_fields(PIECE, WRONG_PIECE))
        return case(f"event: {rule}", stream(PIECE, event, LAST, USAGE))
    if kind == "usage":
        rule, event = draw(broken_fields(USAGE, WRONG_USAGE, [("usage",), ("usage", "completion_tokens")]))
        return case(f"last event: {rule}", stream(PIECE, LAST, event))
    if kind == "line":
        name = draw(st.sampled_from(list(BAD_LINES)))
        return case(f"event: {name}", stream(PIECE, BAD_LINES[name], LAST, USAGE))
    if kind == "metrics":
        name = draw(st.sampled_from(list(BAD_METRICS)))
        return metrics_case(name, BAD_METRICS[name])
    if kind == "models":
        rule, content = draw(broken_text(encoded(MODEL_LIST)))
        return case(f"models: {rule}", good("x"), Reply([content]))
    name = draw(st.sampled_from(list(BAD_STREAMS)))
    reply = BAD_STREAMS[name]
    headers = {key: value.replace("PORT", str(server().port)) for key, value in reply.headers.items()}
    return case(name, Reply(reply.pieces, reply.status, headers))
