"""The client against a real HTTP server that fails in every way we know of."""

import asyncio
import time

import pytest
from fakes.openai_server import FakeServer, ServerThread, answer_to

from fledge.data.rejects import Reject
from fledge.errors import UserError
from fledge.regeneration.chat_completions import parse_retry_after, room
from fledge.regeneration.engine import PromptRequest
from fledge.regeneration.openai_client import OpenAIClient, Patience, normal_url

QUICK = Patience(request_s=1.0, give_up_after_s=2.0, backoff_s=0.01, probe_every_s=0.1, probe_timeout_s=0.2)


def request(prompt: str, max_tokens: int = 64, thinking: bool | None = None) -> PromptRequest:
    return PromptRequest([{"role": "user", "content": prompt}], max_tokens, 0.7, 0.9, 7, thinking)


def ask(urls: list[str], prompts: list[str], patience: Patience = QUICK, **options):
    """Answers (or exceptions) to all prompts, asked at once, and the client's error counts."""

    async def run():
        async with OpenAIClient(
            urls, concurrency=options.pop("concurrency", 8), patience=patience, **options
        ) as client:
            answers = await asyncio.gather(*(client.answer(request(p)) for p in prompts), return_exceptions=True)
            return answers, client.errors

    return asyncio.run(run())


@pytest.fixture
def start():
    servers: list[ServerThread] = []

    def begin(**options) -> ServerThread:
        servers.append(ServerThread(FakeServer(**options)))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def test_an_answer_with_its_tokens(start):
    server = start()
    answers, errors = ask([server.url], ["hello"])
    assert answers[0].text == answer_to("hello") and answers[0].finish_reason == "stop"
    assert bytes(answers[0].output_ids[:-1]).decode() == answers[0].text
    assert answers[0].num_output_tokens == len(answers[0].output_ids)
    assert not errors
    body = server.server.bodies[0]
    assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0.7, 0.9, 7, 64)
    assert "chat_template_kwargs" not in body


def test_only_vllm_is_asked_for_token_ids(start):
    server = start(is_vllm=False)
    answers, _ = ask([server.url], ["hello"])
    assert answers[0].output_ids is None and answers[0].num_output_tokens > 0
    assert "return_token_ids" not in server.server.bodies[0]


@pytest.mark.parametrize(
    "fault, kind",
    [
        ("429", "rate limited"), ("500", "HTTP 500"), ("503", "HTTP 503"), ("reset", "connection broke"),
        ("hang", "time-out"), ("bad-json", "malformed answer"), ("wrong-shape", "malformed answer"),
        ("empty", "empty answer"),
    ],
)  # fmt: skip
def test_a_passing_fault_costs_nothing_but_time(start, fault, kind):
    server = start()
    faulty = f"q [fault: {fault} x1]"
    answers, errors = ask([server.url], [faulty, "untouched"])
    assert answers[0].text == answer_to(faulty) and answers[1].text == answer_to("untouched")
    assert errors == {kind: 1}
    assert server.server.asked == {faulty: 2, "untouched": 1}


@pytest.mark.parametrize(
    "fault, reason, asked",
    [
        ("500", "HTTP 500", 3), ("reset", "connection broke", 3), ("bad-json", "malformed answer", 3),
        ("empty", "empty answer", 3), ("too-long", "context length", 1), ("422", "HTTP 422", 1),
        ("filtered", "finish_reason content_filter", 1),
    ],
)  # fmt: skip
def test_a_lasting_fault_rejects_the_request_with_its_reason(start, fault, reason, asked):
    server = start()
    faulty = f"q [fault: {fault}]"
    patience = Patience(request_s=1.0, backoff_s=0.01, max_attempts=3)
    answers, _ = ask([server.url], [faulty, "untouched"], patience)
    assert isinstance(answers[0], Reject) and answers[0].reason == reason
    assert answers[1].text == answer_to("untouched")
    assert server.server.asked[faulty] == asked


def test_retry_after_is_honoured(start):
    server = start()
    began = time.monotonic()
    ask([server.url], ["q [fault: 429 x2]"])
    assert time.monotonic() - began >= 0.4  # twice 0.2 s, where backoff alone would be 0.01 s


def test_an_answer_that_does_not_fit_is_asked_shorter(start):
    server = start()
    answers, errors = ask([server.url], ["q [fault: no-room]"])  # 64 tokens fit
    assert answers[0].text == answer_to("fits")

    async def long():
        async with OpenAIClient([server.url], concurrency=1, patience=QUICK) as client:
            return await client.answer(request("q [fault: no-room]", max_tokens=1000))

    assert asyncio.run(long()).text == answer_to("fits")
    assert [body["max_tokens"] for body in server.server.bodies] == [64, 1000, 100]  # 300 of context - 200 of prompt


@pytest.mark.parametrize(
    ("renders", "length", "max_tokens", "asked", "counted"),
    [((), 1900, 64, [], 1), ((), 700, 800, [296], 1), ((), 300, 64, [64], 0), (None, 1900, 64, [64], 0)],
)
def test_a_long_prompt_is_counted_before_it_is_asked(start, renders, length, max_tokens, asked, counted):
    """The newest vLLM refuses what does not fit without counting it to its end: a hopeless prompt cost two requests.

    Now it costs one, which needs no GPU; a short one, and one on a server that does not count, are asked as before.
    """
    server = start(context=1000, renders=renders)

    async def run():
        async with OpenAIClient([server.url], patience=QUICK) as client:
            return await client.answer(request("q" * length, max_tokens=max_tokens))

    if asked:
        asyncio.run(run())
    else:
        with pytest.raises(Reject, match="context length: .*the prompt has 1904 tokens, the context 1000"):
            asyncio.run(run())
    assert [body["max_tokens"] for body in server.server.bodies] == asked
    assert server.server.num_tokenized == counted


def test_one_of_three_servers_dies_and_comes_back(start):
    servers = [start(delay_s=0.01) for _ in range(3)]
    prompts = [f"question {i}" for i in range(600)]

    async def run():
        async with OpenAIClient([s.url for s in servers], concurrency=4, patience=QUICK) as client:
            asking = asyncio.gather(*(client.answer(request(prompt)) for prompt in prompts))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(servers[1].stop)
            before = servers[1].server.num_answers
            await asyncio.sleep(0.3)
            await asyncio.to_thread(servers[1].start)
            return await asking, before, client.errors

    answers, before, errors = asyncio.run(run())
    assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in prompts]
    assert errors["connection refused"] + errors["connection broke"] > 0
    assert servers[1].server.num_answers > before > 0  # it was given work again


def test_a_server_that_hangs_loses_its_requests_to_the_others(start):
    hanging, well = start(), start()
    patience = Patience(request_s=60.0, backoff_s=0.01, probe_every_s=0.05, probe_timeout_s=0.1)

    async def run():
        async with OpenAIClient([hanging.url, well.url], concurrency=4, patience=patience) as client:
            hanging.server.hanging = True
            answers = await asyncio.gather(*(client.answer(request(f"q{i}")) for i in range(20)))
            return answers, client.errors

    began = time.monotonic()
    answers, errors = asyncio.run(run())
    assert [answer.text for answer in answers] == [answer_to(f"q{i}") for i in range(20)]
    assert errors["server hangs"] == 4 and time.monotonic() - began < 10


def test_no_server_at_all_stops_the_run(start):
    server = start()

    async def run():
        patience = Patience(give_up_after_s=0.3, backoff_s=0.01, probe_every_s=0.05, probe_timeout_s=0.1)
        async with OpenAIClient([server.url], concurrency=2, patience=patience) as client:
            await asyncio.to_thread(server.stop)
            return await client.answer(request("q"))

    with pytest.raises(UserError, match="no server could be used.*run the same command again"):
        asyncio.run(run())
    with pytest.raises(UserError, match=r"no server answers at \S+ \(Connection refused\)"):
        ask([server.url], ["q"])


def test_silent_ports_are_forgotten_when_they_are_candidates(start):
    server = start()
    answers, _ = ask(["127.0.0.1:9", server.url], ["q"], only_answering=True)
    assert answers[0].text == answer_to("q")


def test_the_key_is_sent_and_a_wrong_one_stops_the_run(start):
    server = start(api_key="secret")
    answers, _ = ask([server.url], ["q"], api_key="secret")
    assert answers[0].text == answer_to("q")
    with pytest.raises(UserError, match="401.*api-key-env"):
        ask([server.url], ["q"], api_key="guess")


def test_a_mixture_of_models_is_refused(start):
    one, other = start(), start()
    other.server.model = "another"
    with pytest.raises(UserError, match="serves another, not fake-target"):
        ask([one.url, other.url], ["q"])


def test_concurrency_is_kept_per_server(start):
    server = start(delay_s=0.05)
    ask([server.url], [f"q{i}" for i in range(20)], concurrency=5)
    assert server.server.most_in_flight == 5


def test_small_readers():
    assert normal_url("host:1") == "http://host:1/v1" and normal_url("https://a/b/v1/") == "https://a/b/v1"
    assert parse_retry_after("1.5") == 1.5 and parse_retry_after("soon") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert room("maximum context length is 1024 tokens. Your request has 1000 input tokens") == 24
    assert room("something else") is None
