"""Ask an OpenAI-compatible server, with a clock beside every answer; read its Prometheus metrics.

An answer is streamed, so that the time to the first token is seen; tokens are counted by the server's own usage report.
Knows HTTP and the two metric dialects (vLLM's counters, SGLang's gauge); nothing of data sets or rows.
"""

import dataclasses
import math
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from msgspec import UNSET

from fledge.data.sampling import ExtraSampling
from fledge.http_client import Client, Limits, ServerError
from fledge.servers.replies import Chunk, Usage, error_text, read_reply

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
SGLANG_TAU = "sglang:spec_accept_length"
METRICS = Limits(total_s=30.0, body_bytes=16 << 20)
LARGEST = 1e15  # of a counter; more is none
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")


@dataclasses.dataclass(frozen=True)
class ServerAnswer:
    """One streamed answer and its clock."""

    text: str
    num_tokens: int
    ttft_s: float  # request sent -> first token
    decode_s: float  # first token -> last token
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class ServerRequest:
    """The sampling settings every request carries."""

    model: str
    temperature: float
    top_p: float
    extra: ExtraSampling
    max_tokens: int
    enable_thinking: bool | None

    def body(self, messages: list[dict[str, str]], seed: int) -> dict[str, Any]:
        """The JSON of one chat completion; what is at its default is left to the server."""
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": self.temperature, "top_p": self.top_p,
            "max_tokens": self.max_tokens, "seed": seed, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        body |= self.extra.given()
        if self.extra.top_k == 0:
            body["top_k"] = -1  # all tokens, for vLLM and SGLang alike
        if self.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return body


async def ask(
    client: Client, url: str, request: ServerRequest, messages: list[dict[str, str]], seed: int
) -> ServerAnswer:
    """One chat completion, streamed; a ServerError when it is none."""
    start = time.perf_counter()
    first = last = None
    pieces: list[str] = []
    usage, reason = Usage(), ""
    async with client.stream(f"{url}/v1/chat/completions", request.body(messages, seed)) as (status, lines):
        if status != 200:
            text = error_text(b"\n".join([line async for line in lines]))
            raise ServerError(f"HTTP {status}", f"the server answered with status {status}: {text}")
        async for chunk in _events(lines):
            if chunk.error is not UNSET:
                raise ServerError("stopped answer", f"the server stopped an answer: {error_text(bytes(chunk.error))}")
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                reason = choice.finish_reason or reason
                if choice.delta and (piece := choice.delta.content or choice.delta.thoughts):
                    last = time.perf_counter()
                    first = first or last
                    pieces.append(piece)
    if usage.completion_tokens is None:
        raise ServerError("malformed answer", "no usage report, so its tokens cannot be counted. Update the server")
    end = time.perf_counter()
    first, last = first or end, last or end
    return ServerAnswer("".join(pieces), usage.completion_tokens, first - start, last - first, reason)


async def metrics(client: Client, url: str) -> dict[str, float]:
    """The server's speculative-decoding metrics; empty when it has none."""
    try:
        reply = await client.get(f"{url}/metrics", limits=METRICS)
    except ServerError:
        return {}
    return parse_metrics(reply.content.decode(errors="replace")) if reply.status == 200 else {}


def parse_metrics(text: str) -> dict[str, float]:
    """Counters by name, and by `name:position` for those by position; engines of one server are added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if not match:
            continue
        name, labels = match[1].removesuffix("_total"), match[2] or ""
        if name.endswith("_created"):  # when a counter began; Prometheus clients send it along
            continue
        if name == PER_POSITION:
            position = re.search(r'position="(\d+)"', labels)
            name = f"{name}:{position[1]}" if position else name
        if name.startswith((DRAFTS, ACCEPTED, SGLANG_TAU)) and (value := _number(match[3])) is not None:
            before = found.get(name, 0.0)
            found[name] = max(before, value) if name == SGLANG_TAU else before + value
    return found


def _number(text: str) -> float | None:
    """A counter's value; None for what is none (NaN, too large, below 0, no number)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= LARGEST else None


def metrics_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What happened in between: differences of counters, the gauge as it is now."""
    return {
        name: value if name == SGLANG_TAU else value - before.get(name, 0.0) for name, value in after.items()
    }  # fmt: skip


def acceptance_of(change: dict[str, float]) -> dict[str, Any] | None:
    """tau and acceptance by position from a server's metrics; None when it drafted nothing."""
    rounds = change.get(DRAFTS, 0.0)
    if not rounds:
        gauge = change.get(SGLANG_TAU)
        return {"tau": gauge, "tau_macro": None, "by_position": [], "by_position_conditional": []} if gauge else None
    depth = sum(name.startswith(f"{PER_POSITION}:") for name in change)
    reached = [rounds, *(change.get(f"{PER_POSITION}:{position}", 0.0) for position in range(depth))]
    return {
        "tau": 1.0 + change.get(ACCEPTED, 0.0) / rounds,
        "tau_macro": None,
        "rounds": int(rounds),
        "drafted_depth": depth,
        "by_position": [count / rounds for count in reached[1:]],
        "by_position_conditional": [
            after / before if before else None for before, after in zip(reached, reached[1:], strict=False)
        ],
        "length_histogram": [int(now - then) for now, then in zip(reached, [*reached[1:], 0.0], strict=True)],
    }


async def _events(lines: AsyncIterator[bytes]) -> AsyncIterator[Chunk]:
    """The documents of a server-sent event stream."""
    async for line in lines:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield read_reply(data, Chunk)
