"""The chat-completions protocol: what is sent, what comes back, and what an error means.

Knows JSON and error texts of vLLM, SGLang and OpenAI. Knows no sockets, no retries: `openai_client.py` does.
"""

import json
import re
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from fledge.data.engine import Answer, Request
from fledge.data.rejects import Reject

STOP_REASONS: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "length": "length",
}
CONTEXT_ERROR = re.compile(r"context (length|window)|max_model_len|maximum.{0,40}tokens|too (long|many tokens)", re.I)


class Failure(Exception):
    """An attempt that may succeed another time. `counts`: against the request's attempts."""

    def __init__(self, kind: str, detail: str, *, counts: bool = True) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.counts = kind, detail, counts


class ContextTooLong(Exception):
    """The server says that prompt and answer do not fit; `room` is what is left for the answer, where it said so."""

    def __init__(self, detail: str, room: int | None) -> None:
        super().__init__(detail)
        self.detail, self.room = detail, room


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or a date."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def body(request: Request, *, model: str, max_model_len: int | None, token_ids: bool) -> dict[str, Any]:
    """The JSON of a request; an answer longer than the server's context is not asked for."""
    max_tokens = min(request.max_tokens, max_model_len - 1) if max_model_len else request.max_tokens
    fields: dict[str, Any] = {
        "model": model, "messages": request.messages, "max_tokens": max_tokens,
        "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed,
    }  # fmt: skip
    if request.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": request.thinking}
    if token_ids:
        fields["return_token_ids"] = True
    return fields


def parse_completion(content: bytes) -> Answer:
    """A chat completion; raises Failure when it is none, or empty."""
    try:
        document = json.loads(content)
        choice, usage = document["choices"][0], document.get("usage") or {}
        message, reason = choice["message"], choice["finish_reason"]
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        prompt_ids, output_ids = document.get("prompt_token_ids"), choice.get("token_ids")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        start = content[:80].decode(errors="replace")
        raise Failure("malformed answer", f"{type(error).__name__}: {error}; it starts {start!r}") from None
    if reason in ("abort", "error", None):
        raise Failure("malformed answer", f"finish_reason {reason!r}")
    if reason not in STOP_REASONS:
        raise Reject(f"finish_reason {reason}", "the server ended the answer itself")
    if not text.strip() and reasoning and reason == "length":
        raise Reject("cut while reasoning", f"{usage.get('completion_tokens', '?')} tokens and no answer yet")
    if not text.strip():
        raise Failure("empty answer", f"finish_reason {reason}, {usage.get('completion_tokens', '?')} tokens")
    return Answer(
        text=text, finish_reason=STOP_REASONS[reason], reasoning=reasoning or None,
        num_prompt_tokens=int(usage.get("prompt_tokens") or len(prompt_ids or ())),
        num_output_tokens=int(usage.get("completion_tokens") or len(output_ids or ())),
        prompt_ids=prompt_ids if prompt_ids and output_ids else None,
        output_ids=output_ids if prompt_ids and output_ids else None,
    )  # fmt: skip


def error_text(content: bytes) -> str:
    """The message inside an error document, or its beginning."""
    text = content.decode(errors="replace")
    try:
        document = json.loads(text)
        error = document.get("error", document)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:400]


def room(text: str) -> int | None:
    """Tokens left for the answer, from a message like "maximum context length is 1024 tokens ... 731 input tokens"."""
    limit = re.search(r"(?:context length (?:is|of)|max_model_len=?)\D{0,10}(\d+)", text, re.I)
    prompt = re.search(r"(\d+)\s+(?:input tokens|tokens in the messages|in the messages|prompt tokens)", text, re.I)
    return int(limit[1]) - int(prompt[1]) if limit and prompt else None


def shorter(request: Request, error: ContextTooLong) -> Request:
    """The same request for an answer that may fit; raises Reject when none can."""
    if error.room is not None and 0 < error.room < request.max_tokens:
        return replace(request, max_tokens=error.room)
    if error.room is not None or request.max_tokens < 32:
        raise Reject("context length", error.detail) from None
    return replace(request, max_tokens=request.max_tokens // 2)
