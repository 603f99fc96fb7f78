"""A small real HTTP server that answers like vLLM and fails on demand: in tests, and as a program for benchmarks.

    python tests/fakes/openai_server.py --port 7000 --tokens-per-s 20000 --answer-tokens 300

Its answer depends only on what is asked, so a test knows every row of a run: `answer_to`. A prompt may carry faults,
`[fault: 500 x2]` and the like: the first two times this prompt is asked it gets HTTP 500. Faults of the whole server
(`hanging`, `ServerThread.stop`) are switched by the test. A `reply` says something else: from the request's JSON it
makes what differs in the choice, {"message": {"tool_calls": [...]}, "finish_reason": "tool_calls"} and the like.
"""

import argparse
import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable

from aiohttp import web

FAULT = re.compile(r"\[fault: ([\w-]+)(?: x(\d+))?\]")
MODEL = "fake-target"


def answer_to(prompt: str) -> str:
    """What the server says to a conversation whose last user turn is this."""
    return f"answer {hashlib.sha256(prompt.encode()).hexdigest()[:8]} to {prompt[:20]!r}"


class FakeServer:
    """`asked` counts prompts, `bodies` keeps the requests (when asked to), `most_in_flight` the concurrency seen."""

    def __init__(
        self, *, is_vllm: bool = True, delay_s: float = 0.0, answer_tokens: int = 0, tokens_per_s: float = 0.0,
        context: int = 4096, keep_bodies: bool = True, api_key: str | None = None,
        reply: Callable[[dict], dict] | None = None, renders: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        """`renders`: fields beside the messages that /tokenize puts into a prompt; without any it is not there."""
        self.reply, self.renders, self.num_tokenized = reply, renders, 0
        self.is_vllm, self.delay_s, self.context, self.api_key = is_vllm, delay_s, context, api_key
        self.answer_tokens, self.tokens_per_s, self.keep_bodies = answer_tokens, tokens_per_s, keep_bodies
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = self.num_answers = 0
        self.hanging = False
        self.model = MODEL
        self._free_at = 0.0
        self._filler = " ".join(["word"] * answer_tokens)

    def app(self) -> web.Application:
        """A new application (one can be run once only); what the server remembers outlives it."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.chat)
        if self.renders is not None:
            app.router.add_post("/tokenize", self.tokenize)
        return app

    async def models(self, request: web.Request) -> web.Response:
        if self.hanging:
            await asyncio.sleep(3600)
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "Invalid API key."}}, status=401)
        facts = {"owned_by": "vllm", "max_model_len": self.context} if self.is_vllm else {"owned_by": "someone"}
        return web.json_response({"data": [{"id": self.model, **facts}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._chat(request)
        finally:
            self.in_flight -= 1

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.hanging:
            await asyncio.sleep(3600)
        body = await request.json()
        if self.keep_bodies:
            self.bodies.append(body)
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else next(p["text"] for p in content if p["type"] == "text")
        if self.keep_bodies:
            self.asked[prompt] += 1
        fault = FAULT.search(prompt)
        if fault and self.asked[prompt] <= int(fault[2] or 1 << 30):
            return await self._fail(request, fault[1], body)
        await self._take_time()
        return web.json_response(self._completion(body, prompt))

    async def tokenize(self, request: web.Request) -> web.Response:
        """vLLM's: the tokens (here bytes) of a prompt."""
        body, shown = await request.json(), self.renders or ()
        self.num_tokenized += 1
        parts = [f"{m['role']}{m['content']}" for m in body["messages"] if m["role"] != "system" or "system" in shown]
        told = {**(body.get("chat_template_kwargs") or {}), "tools": body.get("tools")}
        parts += [json.dumps(told[name]) for name in shown if told.get(name) is not None]
        tokens = list("".join(parts).encode())
        return web.json_response({"count": len(tokens), "max_model_len": self.context, "tokens": tokens})

    async def _take_time(self) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.tokens_per_s:  # one queue: answers leave at this rate, however many wait
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now) + self.answer_tokens / self.tokens_per_s
            await asyncio.sleep(self._free_at - now)

    async def _fail(self, request: web.Request, fault: str, body: dict) -> web.StreamResponse:
        error = {"error": {"message": f"injected {fault}", "type": "fault"}}
        if fault == "429":
            return web.json_response(error, status=429, headers={"Retry-After": "0.2"})
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":  # half an answer, then the connection is gone
            response = web.StreamResponse(headers={"Content-Length": "100000"})
            await response.prepare(request)
            await response.write(b'{"choices": [{"mess')
            assert request.transport is not None
            request.transport.abort()
            return response
        if fault == "bad-json":
            return web.Response(body=b'{"choices": [{"message": {"con', content_type="application/json")
        if fault == "wrong-shape":
            return web.json_response({"choices": []})
        if fault == "empty":
            return web.json_response(self._completion(body, "", text="  "))
        if fault == "length":
            return web.json_response(self._completion(body, "cut", finish_reason="length"))
        if fault == "filtered":
            return web.json_response(self._completion(body, "cut", finish_reason="content_filter"))
        if fault == "too-long":
            error["error"]["message"] = (
                f"This model's maximum context length is {self.context} tokens. However, your prompt contains at least "
                f"{self.context + 1} input tokens."
            )
            return web.json_response(error, status=400)
        if fault == "no-room":  # the answer fits only when at most 100 tokens are asked for
            if body["max_tokens"] <= 100:
                return web.json_response(self._completion(body, "fits"))
            error["error"]["message"] = (
                "This model's maximum context length is 300 tokens and there are 200 prompt tokens."
            )
            return web.json_response(error, status=400)
        return web.json_response(error, status=int(fault))

    def _completion(self, body: dict, prompt: str, *, text: str | None = None, finish_reason: str = "stop") -> dict:
        self.num_answers += 1
        text = text if text is not None else self._filler or answer_to(prompt)
        output_ids = [5] * self.answer_tokens or list(text.encode()) + [2]
        prompt_ids = list("".join(f"{m['role']}{m['content']}" for m in body["messages"]).encode())
        extra = {"prompt_token_ids": prompt_ids} if body.get("return_token_ids") else {}
        choice = {
            "index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text},
            **({"token_ids": output_ids} if extra else {}),
        }  # fmt: skip
        if self.reply:
            said = self.reply(body)
            choice |= said | {"message": choice["message"] | said.get("message", {})}
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(output_ids)}
        return {"id": "x", "model": self.model, "choices": [choice], "usage": usage, **extra}


class ServerThread:
    """A FakeServer on a thread of its own; `stop` drops every connection, `start` again brings back the same port."""

    def __init__(self, server: FakeServer, port: int = 0) -> None:
        self.server, self.port = server, port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        async def run() -> None:
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            runner = web.AppRunner(self.server.app(), shutdown_timeout=0.05)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = runner.addresses[0][1]
            started.set()
            await self._stopping.wait()
            await runner.cleanup()

        asyncio.run(run())  # cancels the handlers that hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens-per-s", type=float, default=0.0)
    parser.add_argument("--answer-tokens", type=int, default=0)
    parser.add_argument("--delay-s", type=float, default=0.0)
    args = parser.parse_args()
    server = FakeServer(
        answer_tokens=args.answer_tokens, tokens_per_s=args.tokens_per_s, delay_s=args.delay_s, keep_bodies=False
    )
    web.run_app(server.app(), host="127.0.0.1", port=args.port, print=lambda *line: print(json.dumps(line), flush=True))


if __name__ == "__main__":
    main()
