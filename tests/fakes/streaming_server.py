"""A small real server that streams answers at a fixed pace and counts drafts in /metrics as vLLM does."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator

from aiohttp import web

DEPTH = 3


class StreamingServer:
    """Streams `num_tokens` tokens, `gap_s` apart after `ttft_s`; with a head two per round, one of them drafted."""

    def __init__(self, *, has_head: bool, gap_s: float = 0.004, ttft_s: float = 0.01, num_tokens: int = 9) -> None:
        self.has_head, self.gap_s, self.ttft_s, self.num_tokens = has_head, gap_s, ttft_s, num_tokens
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = self.rounds = 0
        self.fail_after: int | None = None

    async def models(self, request):
        return web.json_response({"data": [{"id": "served-name"}]})

    async def chat(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.authorization = request.headers.get("Authorization")
        if self.fail_after is not None and len(self.bodies) > self.fail_after:
            return web.json_response({"error": "out of memory"}, status=500)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(document):
            await response.write(f"data: {json.dumps(document)}\n\n".encode())

        await asyncio.sleep(self.ttft_s)
        await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        sent, per_step = 1, 2 if self.has_head else 1
        await send({"choices": [{"delta": {"content": "t"}}]})
        while sent < self.num_tokens:
            await asyncio.sleep(self.gap_s)
            self.rounds += self.has_head
            await send({"choices": [{"delta": {"content": "t" * per_step}}]})
            sent += per_step
        await send({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await send({"choices": [], "usage": {"completion_tokens": self.num_tokens}})
        await response.write(b"data: [DONE]\n\n")
        self.in_flight -= 1
        return response

    async def metrics(self, request):
        if not self.has_head:
            return web.Response(text="# HELP vllm:num_requests_running x\nvllm:num_requests_running 0\n")
        kept = [self.rounds, 0, 0]
        lines = [
            f'vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {1000 + self.rounds}.0',
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {DEPTH * self.rounds}',
            f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {500 + sum(kept)}',
            *(
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{i}"}} {100 + count}'
                for i, count in enumerate(kept)
            ),
            *(
                f'vllm:spec_decode_num_accepted_tokens_per_pos_created{{engine="0",position="{i}"}} 1.7e9'
                for i in range(len(kept))
            ),
        ]
        return web.Response(text="\n".join(lines) + "\n")


@contextlib.contextmanager
def starting() -> Iterator[Callable[..., str]]:
    """Within the block servers can be run in a thread: start(server) returns its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runners = []

    def go(server: StreamingServer, port: int = 0) -> str:
        async def up() -> str:
            app = web.Application()
            app.router.add_get("/v1/models", server.models)
            app.router.add_post("/v1/chat/completions", server.chat)
            app.router.add_get("/metrics", server.metrics)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            runners.append(runner)
            return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

        return asyncio.run_coroutine_threadsafe(up(), loop).result()

    yield go
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
