"""The chat-completions protocol: what is sent, what comes back, and what an error means.

Knows JSON and error texts of vLLM, SGLang and OpenAI. Knows no sockets, no retries: `openai_client.py` does.
"""

import re
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from fledge.data.engine import Answer, Request
from fledge.data.rejects import Reject
from fledge.servers.client import ServerError
from fledge.servers.replies import Completion, Usage, read_reply

STOP_REASONS: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "length": "length",
}
CONTEXT_ERROR = re.compile(r"context (length|window)|max_model_len|maximum.{0,40}tokens|too (long|many tokens)", re.I)


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
    """A chat completion; raises ServerError when it is none, or empty, and Reject when asking again cannot help."""
    found = read_reply(content, Completion)
    choice, usage = found.choices[0], found.usage or Usage()
    text, reasoning, reason = choice.message.content or "", choice.message.thoughts, choice.finish_reason
    if reason in ("abort", "error", None):
        raise ServerError("malformed answer", f"finish_reason {reason!r}")
    if reason not in STOP_REASONS:
        raise Reject(f"finish_reason {reason}", "the server ended the answer itself")
    num_tokens = "?" if usage.completion_tokens is None else usage.completion_tokens
    if not text.strip() and reasoning and reason == "length":
        raise Reject("cut while reasoning", f"{num_tokens} tokens and no answer yet")
    if not text.strip():
        raise ServerError("empty answer", f"finish_reason {reason}, {num_tokens} tokens")
    prompt_ids, output_ids = found.prompt_token_ids, choice.token_ids
    return Answer(
        text=text, finish_reason=STOP_REASONS[reason], reasoning=reasoning or None,
        num_prompt_tokens=usage.prompt_tokens or len(prompt_ids or ()),
        num_output_tokens=usage.completion_tokens or len(output_ids or ()),
        prompt_ids=prompt_ids if prompt_ids and output_ids else None,
        output_ids=output_ids if prompt_ids and output_ids else None,
    )  # fmt: skip


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
