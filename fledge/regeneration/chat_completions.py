"""The chat-completions protocol: what is sent, what comes back, and what an error means.

Knows JSON and error texts of vLLM, SGLang, TGI and OpenAI. Knows no sockets, no retries: `openai_client.py` does.
"""

import json
import re
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import msgspec

from fledge.data.rejects import Reject
from fledge.http_client import ServerError
from fledge.regeneration.engine import PromptAnswer, PromptRequest
from fledge.servers.replies import Completion, Usage, read_reply

STOP_REASONS: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "length": "length",
    "tool_calls": "stop",
    "function_call": "stop",
}
CHARACTERS_PER_TOKEN = 2  # a token of text has more, in nearly every language
CONTEXT_ERROR = re.compile(
    r"context (length|window|size)|max_model_len|maximum (model|.{0,40}length|.{0,40}tokens)|too (long|many tokens)"
    r"|tokens? is too large|`max_new_tokens`|must have less than \d+ tokens|at most \d+ completion tokens",
    re.I,
)
# What servers call the context's length and the prompt's, one alternative per wording (tests hold the whole texts).
CONTEXT = re.compile(
    r"(?:context (?:length|window|size)|maximum model length|max_model_len|allowed(?: input)? length)"
    r"(?: is| of|=)?(?: only)? ?\(?(\d+)"
    r"|`max_new_tokens` must be <= (\d+)\. Given: \d+ `inputs`|less than (\d+) tokens",
    re.I,
)
PROMPT = re.compile(
    r"(\d+) (?:input tokens|`inputs` tokens|prompt tokens|tokens from the input messages)"
    r"|(\d+) in (?:the messages|your prompt)|messages resulted in (\d+)|prompt \(length (\d+)\)"
    r"|(?:input|request|input length) \((\d+) tokens\)|input length (\d+) exceeds|less than \d+ tokens\. Given: (\d+)",
    re.I,
)
TOOLS = re.compile(r"(\d+) in the functions", re.I)  # OpenAI counts them apart from the messages
PART_OF_PROMPT = re.compile(r"at least \d+ input tokens|passed \d+ input \w+ and requested", re.I)
ANSWER_LIMIT = re.compile(r"at most (\d+) completion tokens|`max_new_tokens` must be <= (\d+)\. Given: \d+$", re.I)


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


def body(request: PromptRequest, *, model: str, max_model_len: int | None, token_ids: bool) -> dict[str, Any]:
    """The JSON of a request; an answer longer than the server's context is not asked for."""
    fields: dict[str, Any] = {
        "model": model, "messages": [_as_sent(message) for message in request.messages],
        "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed, **request.extra.given(),
    }  # fmt: skip
    if request.max_tokens is not None:
        fields["max_tokens"] = min(request.max_tokens, max_model_len - 1) if max_model_len else request.max_tokens
    if request.extra.top_k == 0:
        fields["top_k"] = -1  # all tokens: every server understands this, not every one 0
    if request.continues:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.tools:
        fields["tools"] = request.tools
    if kwargs := request.chat_template_kwargs:
        fields["chat_template_kwargs"] = kwargs
        if "reasoning_effort" in kwargs:  # gpt-oss is rendered without a template by vLLM, from this field
            fields["reasoning_effort"] = kwargs["reasoning_effort"]
    if token_ids and not request.extra.stop:  # what a stop string cuts from the text is still among the ids
        fields["return_token_ids"] = True
    return fields


def prompt_body(request: PromptRequest, model: str) -> dict[str, Any]:
    """The JSON that asks vLLM's /tokenize for the prompt of a request."""
    messages = [_as_sent(message) for message in request.messages]
    told = {"tools": request.tools, "chat_template_kwargs": request.chat_template_kwargs}
    given = {name: value for name, value in told.items() if value}
    return {"model": model, "messages": messages, "add_generation_prompt": True, **given}


def may_not_fit(request: PromptRequest, max_model_len: int) -> bool:
    """Whether a prompt may leave less room than its answer may take, by its characters."""
    texts = [message["content"] for message in request.messages if isinstance(message["content"], str)]
    characters = sum(map(len, texts)) + len(json.dumps(request.tools or ""))
    return characters > CHARACTERS_PER_TOKEN * (max_model_len - (request.max_tokens or 0))


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under both of its names: servers differ in which one they read."""
    reasoning = message.get("reasoning_content")
    return {**message, "reasoning": reasoning} if reasoning else message


def parse_completion(content: bytes) -> PromptAnswer:
    """A chat completion; raises ServerError when it is none, or empty, and Reject when asking again cannot help."""
    found = read_reply(content, Completion)
    choice, usage = found.choices[0], found.usage or Usage()
    text, reasoning, reason = choice.message.content or "", choice.message.thoughts, choice.finish_reason
    calls = msgspec.to_builtins(choice.message.tool_calls) or None
    if reason in ("abort", "error", None):
        raise ServerError("malformed answer", f"finish_reason {reason!r}")
    if reason not in STOP_REASONS:
        raise Reject(f"finish_reason {reason}", "the server ended the answer itself")
    num_tokens = "?" if usage.completion_tokens is None else usage.completion_tokens
    if not text.strip() and not calls and not (reasoning and reason == "length"):
        raise ServerError("empty answer", f"finish_reason {reason}, {num_tokens} tokens")
    prompt_ids, output_ids = found.prompt_token_ids, choice.token_ids
    return PromptAnswer(
        text=text, finish_reason=STOP_REASONS[reason], reasoning=reasoning or None, tool_calls=calls,
        num_prompt_tokens=usage.prompt_tokens or len(prompt_ids or ()),
        num_output_tokens=usage.completion_tokens or len(output_ids or ()),
        prompt_ids=prompt_ids if prompt_ids and output_ids else None,
        output_ids=output_ids if prompt_ids and output_ids else None,
    )  # fmt: skip


def room(text: str) -> int | None:
    """Tokens left for the answer, from a message like "maximum context length is 1024 tokens ... 731 input tokens"."""
    context, prompt = _number(CONTEXT, text), _number(PROMPT, text)
    if context is not None and prompt is not None:
        return context - prompt - (_number(TOOLS, text) or 0)
    return _number(ANSWER_LIMIT, text)


def shorter(request: PromptRequest, error: ContextTooLong) -> PromptRequest:
    """The same request for an answer that may fit; raises Reject when none can.

    The newest vLLM stops counting a prompt one token above what fits beside the answer that was asked for, so the room
    it names is too large by an unknown number: it is asked for all the room there is, which is less than was asked for.
    """
    limit = request.max_tokens
    if limit is None or (error.room is not None and error.room < 1) or (error.room is None and limit < 32):
        raise Reject("context length", error.detail) from None
    if PART_OF_PROMPT.search(error.detail):
        return replace(request, max_tokens=None)
    fits = error.room is not None and error.room < limit
    return replace(request, max_tokens=error.room if fits else limit // 2)


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    """The number of whichever alternative of the pattern is found."""
    found = pattern.search(text)
    return int(next(group for group in found.groups() if group is not None)) if found else None
