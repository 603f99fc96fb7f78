"""Ask an OpenAI-compatible server, with a clock beside every answer; read its Prometheus metrics.

An answer is streamed, so that the time to the first token is seen; tokens are counted by the server's own usage report.
Knows HTTP and the two metric dialects (vLLM's counters, SGLang's gauge); nothing of data sets or rows.
"""

import dataclasses
import json
import re
import time
from typing import Any

import aiohttp

from fledge.errors import UserError

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
SGLANG_TAU = "sglang:spec_accept_length"
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One streamed answer and its clock."""

    text: str
    num_tokens: int
    ttft_s: float  # request sent -> first token
    decode_s: float  # first token -> last token
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Request:
    """The sampling settings every request carries."""

    model: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    enable_thinking: bool | None

    def body(self, messages: list[dict[str, str]], seed: int) -> dict[str, Any]:
        """The JSON of one chat completion; what is at its default is left to the server."""
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": self.temperature, "top_p": self.top_p,
            "max_tokens": self.max_tokens, "seed": seed, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.top_k:
            body["top_k"] = self.top_k
        if self.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return body


async def ask(
    session: aiohttp.ClientSession, url: str, request: Request, messages: list[dict[str, str]], seed: int
) -> Answer:
    """One chat completion, streamed."""
    start = time.perf_counter()
    first = last = None
    pieces: list[str] = []
    usage: dict[str, Any] | None = None
    reason = ""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=request.body(messages, seed)) as response:
            if response.status != 200:
                text = " ".join((await response.text()).split())[:300]
                raise UserError(f"{url}: the server answered with status {response.status}: {text}")
            async for chunk in _events(response):
                if "error" in chunk:
                    raise UserError(f"{url}: the server stopped an answer: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    delta = choice.get("delta") or {}
                    piece = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
                    reason = choice.get("finish_reason") or reason
                    if piece:
                        last = time.perf_counter()
                        first = first or last
                        pieces.append(piece)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise UserError(
            f"{url}: no answer ({type(error).__name__}: {error}). Is the server running? What is measured is kept."
        ) from None
    if usage is None:
        raise UserError(f"{url}: the server sent no usage report, so its tokens cannot be counted. Update the server.")
    end = time.perf_counter()
    first, last = first or end, last or end
    return Answer("".join(pieces), int(usage["completion_tokens"]), first - start, last - first, reason)


async def served_model(session: aiohttp.ClientSession, url: str) -> str:
    """The name of the model a server serves."""
    try:
        async with session.get(f"{url}/v1/models") as response:
            return (await response.json())["data"][0]["id"]
    except (TimeoutError, aiohttp.ClientError, OSError, KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{url}: no OpenAI-compatible server there ({type(error).__name__}: {error}). Start one, for instance with "
            f"`fledge serve`, or leave out its URL to have it started."
        ) from None


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's speculative-decoding metrics; empty when it has none."""
    try:
        async with session.get(f"{url}/metrics") as response:
            return parse_metrics(await response.text()) if response.status == 200 else {}
    except (TimeoutError, aiohttp.ClientError, OSError):
        return {}


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
        if name.startswith((DRAFTS, ACCEPTED, SGLANG_TAU)):
            found[name] = max(found.get(name, 0.0), float(match[3])) if name == SGLANG_TAU else (
                found.get(name, 0.0) + float(match[3])
            )  # fmt: skip
    return found


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


async def _events(response: aiohttp.ClientResponse):
    """The JSON documents of a server-sent event stream."""
    async for line in response.content:
        text = line.decode("utf-8").strip()
        if text.startswith("data:") and (data := text[5:].strip()) != "[DONE]":
            yield json.loads(data)
