"""What servers answer: chat completions and model lists, as `fledge regenerate` reads them.

A malformed answer is a rejected row, and never the end of the run.
"""

import asyncio
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.regeneration.engine import PromptRequest
from fledge.regeneration.openai_client import OpenAIClient, Patience
from fuzz.documents import NO_COUNT, NO_LIST, NO_OBJECT, NO_SIZE, NO_TEXT, broken_fields, broken_text, encoded
from fuzz.harness import Case, WrongValue
from fuzz.replies_server import CHAT, MODELS, Endless, Reply, server
from fuzz.rows import TEXT

AREA = "server replies"
MODEL = "target"
IDS = {"prompt_token_ids": [1, 2, 3]}
PATIENCE = Patience(request_s=3.0, backoff_s=0.001, probe_every_s=60.0, max_attempts=2, give_up_after_s=5.0)
NO_TOKENS = (*NO_LIST, ["x"], [-1], [1.5], [None], [True], [[1]], [2**70])

WRONG_COMPLETION: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("choices",): (*NO_LIST, [], None, [5], [None]),
    ("choices", 0): (*NO_LIST, [], None),
    ("choices", 0, "message"): (*NO_OBJECT, None),
    ("choices", 0, "message", "content"): (*NO_TEXT, None, "", " \n", "a\ud800b", ["x"]),
    ("choices", 0, "message", "reasoning_content"): NO_TEXT,
    ("choices", 0, "finish_reason"): (*NO_TEXT, None, "", "nonsense", "abort", {"a": 1}, "x" * 10_000),
    ("choices", 0, "token_ids"): NO_TOKENS,
    ("prompt_token_ids",): NO_TOKENS,
    ("usage",): NO_OBJECT,
    ("usage", "prompt_tokens"): NO_COUNT,
    ("usage", "completion_tokens"): NO_COUNT,
}
REQUIRED = [("choices",), ("choices", 0, "message"), ("choices", 0, "finish_reason")]

MODEL_LIST = {"object": "list", "data": [{"id": MODEL, "owned_by": "vllm", "max_model_len": 4096}]}
WRONG_MODELS: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("data",): (*NO_LIST, [], None, [5], ["x"]),
    ("data", 0): (*NO_LIST, [], None),
    ("data", 0, "id"): (*NO_TEXT, None, ""),
    ("data", 0, "max_model_len"): NO_SIZE,
    ("data", 0, "owned_by"): NO_TEXT,
}
# How a reply can be wrong beside its document.
BAD_HTTP: dict[str, Reply] = {
    "blanks without end": Reply(Endless(b" ")),
    "a list without end": Reply(Endless(b"[")),
    "a redirect to another host": Reply(status=307, headers={"Location": "http://localhost:PORT/elsewhere"}),
    "a redirect to itself": Reply(status=307, headers={"Location": CHAT}),
    "a redirect to a file": Reply(status=302, headers={"Location": "file:///etc/passwd"}),
    "a page": Reply([b"<html>busy</html>"], headers={"Content-Type": "text/html"}),
    "status 204": Reply(status=204),
    "status 418": Reply([b"\xff\xfe teapot"], status=418),
    "status 500 of 2 GiB": Reply(Endless(b"error "), status=500),
    "status 400 without end": Reply(Endless(b"context length "), status=400),
    "a length that is not sent": Reply([b'{"choices"'], headers={"Content-Length": "1000000"}),
    "an unknown encoding": Reply([b"\0" * 100], headers={"Content-Encoding": "br"}),
    "gzip that is none": Reply([b"{}" * 100], headers={"Content-Encoding": "gzip"}),
    "nothing": Reply(),
}
BAD_ERRORS: dict[str, tuple[int, Any]] = {
    "an error that is a list": (400, [1]),
    "an error of an error": (400, {"error": {"message": {"message": ["x"]}}}),
    "an error with a lone surrogate": (400, {"error": {"message": "\ud800"}}),
    "an error with escape codes": (422, {"error": {"message": "\x1b[2J\r\n\n" * 100}}),
    "a context of 10**400": (400, {"error": {"message": f"maximum context length is {10**400}, 5 input tokens"}}),
    "a context of 5000 digits": (
        400, {"error": {"message": f"maximum context length is {'9' * 5000} tokens, 7 input tokens"}}),
    "a negative room": (400, {"error": {"message": "maximum context length is 5 tokens, 731 input tokens"}}),
}  # fmt: skip


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text,
              "reasoning_content": "because"}, "token_ids": [4, 5]}  # fmt: skip
    return {"id": "x", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, **IDS}


async def ask() -> Any:
    client = OpenAIClient([server().url], patience=PATIENCE)
    async with client:
        request = PromptRequest([{"role": "user", "content": "hello"}], 64, 0.0, 1.0, 1, None)
        try:
            return await client.answer(request)
        except UserError as error:
            raise AssertionError(f"ends the run: {error}") from error


def case(rule: str | None, chat: Reply, models: Reply | None = None, text: str = "") -> Case:
    def act(folder: Path) -> None:
        elsewhere = Reply.of(completion("from another host"))
        server().answers = {MODELS: models or Reply.of(MODEL_LIST), CHAT: chat, "/elsewhere": elsewhere}
        answer = asyncio.run(ask())
        if rule is None and (answer.text, answer.num_output_tokens, answer.output_ids) != (text, 2, [4, 5]):
            raise WrongValue(f"{answer!r}")

    return Case(AREA, rule, act, shown=str(chat.pieces if isinstance(chat.pieces, list) else chat.status)[:300])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A completion or a model list, right or wrong in one place."""
    text = draw(TEXT)
    good = completion(text)
    kind = draw(st.sampled_from(["valid", "field", "field", "field", "text", "models", "http", "error"]))
    if kind == "valid":
        more = draw(st.sampled_from([{}, {"service_tier": None}, {"created": 1.5}, {"system_fingerprint": ["x"]}]))
        return case(None, Reply.of({**good, **more}), text=text)
    if kind == "field":
        rule, document = draw(broken_fields(good, WRONG_COMPLETION, REQUIRED))
        return case(f"completion: {rule}", Reply.of(document))
    if kind == "text":
        rule, content = draw(broken_text(encoded(completion("text"))))
        return case(f"completion: {rule}", Reply([content]))
    if kind == "models":
        rule, document = draw(broken_fields(MODEL_LIST, WRONG_MODELS, [("data",), ("data", 0, "id")]))
        return case(f"models: {rule}", Reply.of(good), Reply.of(document))
    if kind == "error":
        name = draw(st.sampled_from(list(BAD_ERRORS)))
        status, document = BAD_ERRORS[name]
        return case(name, Reply([encoded(document)], status=status))
    name = draw(st.sampled_from(list(BAD_HTTP)))
    reply = BAD_HTTP[name]
    headers = {key: value.replace("PORT", str(server().port)) for key, value in reply.headers.items()}
    return case(name, Reply(reply.pieces, reply.status, headers))
