"""Servers measured through HTTP: a small real server streams answers and counts drafts as vLLM does."""

import asyncio
import dataclasses
import json
import threading

import pytest
from aiohttp import web

from fledge.bench.args import ServerArgs
from fledge.bench.client import acceptance_of, metrics_between, parse_metrics
from fledge.bench.rows import read_rows
from fledge.bench.run import bench
from fledge.errors import UserError

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


@pytest.fixture
def start():
    """Run servers in a thread; returns the URL of each."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runners = []

    def go(server: StreamingServer) -> str:
        async def up():
            app = web.Application()
            app.router.add_get("/v1/models", server.models)
            app.router.add_post("/v1/chat/completions", server.chat)
            app.router.add_get("/metrics", server.metrics)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            runners.append(runner)
            return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

        return asyncio.run_coroutine_threadsafe(up(), loop).result()

    yield go
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def server_args(make_args):
    def make(plain_url, eagle_url, *, concurrency=(1,), **flags):
        args = make_args(question_end=4, **flags)
        server = ServerArgs(backend="server", baseline_url=plain_url, eagle_url=eagle_url, concurrency=concurrency)
        return dataclasses.replace(args, server=server)

    return make


def summary(args):
    return json.loads((args.output_dir / "summary.json").read_text())


def test_two_servers_side_by_side(start, server_args):
    plain, eagle = StreamingServer(has_head=False), StreamingServer(has_head=True)
    args = server_args(start(plain), start(eagle) + "/v1", concurrency=(1, 3), repeats=2)
    bench(args)
    sets = summary(args)["sets"]
    assert list(sets) == ["quick, 1 in flight", "quick, 3 in flight"]
    alone, busy = sets.values()
    assert alone["acceptance"]["tau"] == 2.0  # of this level's requests, not of the 1000 rounds before
    assert alone["acceptance"]["by_position"] == [1.0, 0.0, 0.0]
    assert alone["acceptance"]["by_position_conditional"] == [1.0, 0.0, None]
    assert alone["acceptance"]["length_histogram"][:2] == [0, alone["acceptance"]["rounds"]]
    assert 1.3 < alone["speedup"]["value"] < 2.7 and alone["speedup"]["low"] > 1.0
    assert 0.008 < alone["baseline"]["ttft_s_median"] < 0.1 and 0.003 < alone["baseline"]["tpot_s_median"] < 0.02
    assert busy["baseline"]["throughput_tokens_per_s"] > 1.5 * alone["baseline"]["throughput_tokens_per_s"]
    assert plain.most_in_flight == 3
    assert alone["quality"] == {"compared": 10, "identical": 10, "unchecked": 0}
    page = (args.output_dir / "report.html").read_text()
    assert "Many users at once" in page and "TPOT" in page


def test_requests_carry_the_settings_and_the_models_own_answers(start, server_args, monkeypatch):
    plain = StreamingServer(has_head=False)
    args = server_args(start(plain), None, mode="baseline", temperature=0.5, top_p=0.9, sample_top_k=7,
                       max_new_token=55, thinking="off")  # fmt: skip
    monkeypatch.setenv("MY_KEY", "secret")
    bench(dataclasses.replace(args, server=dataclasses.replace(args.server, api_key_env="MY_KEY")))
    assert plain.authorization == "Bearer secret"
    body = next(body for body in plain.bodies if len(body["messages"]) == 3)  # a second turn
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == "t" * 9
    expected = {"model": "served-name", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 55}
    assert {key: body[key] for key in expected} == expected
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_finished_levels_are_kept_when_a_server_fails(start, server_args):
    plain, eagle = StreamingServer(has_head=False), StreamingServer(has_head=True)
    args = server_args(start(plain), start(eagle))
    eagle.fail_after = 2
    with pytest.raises(UserError, match="status 500: .*out of memory"):
        bench(args)
    assert [row["side"] for row in read_rows(args.output_dir / "results.jsonl")] == ["baseline"]
    eagle.fail_after, asked = None, len(plain.bodies)
    bench(args)
    assert len(plain.bodies) == asked  # the finished side is not asked again
    assert summary(args)["sets"]["quick, 1 in flight"]["speedup"]["value"] > 1


def test_nothing_listens(server_args):
    with pytest.raises(UserError, match="no OpenAI-compatible server there"):
        bench(server_args("http://127.0.0.1:9", None, mode="baseline"))


def test_a_server_without_speculation_is_told_apart(start, server_args, capsys):
    args = server_args(start(StreamingServer(has_head=False)), start(StreamingServer(has_head=False)))
    bench(args)
    assert "no speculative decoding" in capsys.readouterr().err
    assert "acceptance" not in summary(args)["sets"]["quick, 1 in flight"]


def test_servers_without_url_are_started_and_stopped_one_at_a_time(start, server_args, monkeypatch):
    """Through the engine behind `fledge serve`: first without the head, then with it, never both."""
    import contextlib

    from fledge.target import engine

    urls = {False: start(StreamingServer(has_head=False)), True: start(StreamingServer(has_head=True))}
    events = []

    @contextlib.contextmanager
    def running(servers, timeout):
        has_head = "--speculative-config" in servers[0].command
        events.append(("up", has_head, "--no-enable-prefix-caching" in servers[0].command))
        yield []
        events.append(("down", has_head))

    checked = []
    monkeypatch.setattr("fledge.export.serving.check_draft", lambda draft, target: checked.append(draft))
    monkeypatch.setattr(engine, "running", running)
    monkeypatch.setattr(
        engine.Server, "url", property(lambda self: urls["--speculative-config" in self.command]), raising=True
    )
    bench(server_args(None, None))
    assert events == [("up", False, True), ("down", False), ("up", True, True), ("down", True)]
    assert checked == ["head"]  # before any server starts: tests/export/test_serving.py says what it refuses


def test_metrics_of_several_engines_are_added_and_others_ignored():
    text = "\n".join(
        [
            "# TYPE vllm:spec_decode_num_drafts_total counter",
            'vllm:spec_decode_num_drafts_total{engine="0"} 10.0',
            'vllm:spec_decode_num_drafts_total{engine="1"} 5.0',
            'vllm:spec_decode_num_drafts_created{engine="1"} 1.7e9',
            'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 12.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 9.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="0"} 1.7e9',
            "python_gc_objects_total 3",
        ]
    )
    found = acceptance_of(metrics_between({}, parse_metrics(text)))
    assert found["tau"] == pytest.approx(1 + 12 / 15) and found["by_position"] == pytest.approx([9 / 15, 3 / 15])


def test_sglang_tells_tau_only():
    found = acceptance_of(metrics_between({}, parse_metrics('sglang:spec_accept_length{model="m"} 2.75\n')))
    assert found["tau"] == 2.75 and found["by_position"] == []
