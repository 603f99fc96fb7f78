"""What servers may answer instead of an answer: each odd reply costs its own row, in regeneration and in the benchmark.

Before, 17 of 30 such replies ended a benchmark with a traceback, and one lone surrogate stopped a regeneration for
good.
"""

import asyncio
import dataclasses
import json

import pytest
from fakes.hostile_server import MODELS, choice, completion, event, http, serving

from fledge.bench.client import acceptance_of, metrics_between, parse_metrics
from fledge.bench.run import bench
from fledge.bench.settings import BenchSettings, ModelSettings, QuestionSettings, ReportSettings, ServedSettings
from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.decoding.settings import SamplingSettings
from fledge.errors import UserError
from fledge.http_client import ServerError
from fledge.regeneration.settings import EngineSettings, PromptSourceSettings
from fledge.servers.replies import Completion, error_text, read_reply

DEEP = b"[" * 100_000


def good() -> bytes:
    return json.dumps(completion()).encode()


def changed(old: str, new: str) -> bytes:
    """A good completion as text, with one piece replaced: for what `json.dumps` would not write."""
    text = json.dumps(completion())
    assert old in text
    return text.replace(old, new).encode()


# name -> the body of a whole reply
BODIES: dict[str, bytes] = {
    "empty": b"",
    "html": b"<html><body>502 Bad Gateway</body></html>",
    "cut": good()[:-10],
    "trailing garbage": good() + b"}",
    "two documents": good() + good(),
    "not utf-8": changed("fine", "f\udcffne".encode("utf-8", "surrogateescape").decode("latin-1")).replace(
        b"f\xc3\xbfne", b"f\xffne"
    ),
    "null": b"null",
    "list": b"[]",
    "string": b'"fine"',
    "number": b"1e999",
    "deep": DEEP,
    "deep in an unknown field": good()[:-1] + b', "more": ' + DEEP + b"}",
    "lone surrogate": changed("fine", "\\ud800"),
    "lone low surrogate": changed("fine", "\\udc00 text"),
    "NaN": changed('"prompt_tokens": 3', '"prompt_tokens": NaN'),
    "infinity": changed('"completion_tokens": 4', '"completion_tokens": Infinity'),
    "huge number": changed('"completion_tokens": 4', '"completion_tokens": ' + "9" * 5000),
    "negative count": json.dumps(completion(usage={"prompt_tokens": 3, "completion_tokens": -4})).encode(),
    "fractional count": json.dumps(completion(usage={"prompt_tokens": 3, "completion_tokens": 4.5})).encode(),
    "count as text": json.dumps(completion(usage={"prompt_tokens": 3, "completion_tokens": "4"})).encode(),
    "count as bool": json.dumps(completion(usage={"prompt_tokens": 3, "completion_tokens": True})).encode(),
    "usage as list": json.dumps(completion(usage=[1, 2])).encode(),
    "usage as text": json.dumps(completion(usage="many")).encode(),
    "no choices": json.dumps(completion(choices=[])).encode(),
    "choices missing": json.dumps({"usage": {}}).encode(),
    "choices as dict": json.dumps(completion(choices={"0": {}})).encode(),
    "choice is null": json.dumps(completion(choices=[None])).encode(),
    "message missing": json.dumps(completion(choices=[{"finish_reason": "stop"}])).encode(),
    "message as text": json.dumps(choice(message="fine")).encode(),
    "content as parts": json.dumps(choice(message={"content": [{"type": "text", "text": "fine"}]})).encode(),
    "content as number": json.dumps(choice(message={"content": 5})).encode(),
    "reasoning as list": json.dumps(choice(message={"content": "fine", "reasoning": ["a"]})).encode(),
    "finish_reason as dict": json.dumps(choice(finish_reason={"type": "stop"})).encode(),
    "finish_reason as list": json.dumps(choice(finish_reason=["stop"])).encode(),
    "finish_reason with a line break": json.dumps(choice(finish_reason="stop\nstop")).encode(),
    "finish_reason endless": json.dumps(choice(finish_reason="s" * 10_000)).encode(),
}
# known only where an answer comes whole
WHOLE_BODIES: dict[str, bytes] = {
    "token ids as text": json.dumps(choice(token_ids=["a"])).encode(),
    "negative token id": json.dumps(choice(token_ids=[-1])).encode(),
    "token id beyond int64": json.dumps(choice(token_ids=[2**70])).encode(),
    "token ids as dict": json.dumps(choice(token_ids={"0": 1})).encode(),
    "fractional prompt token ids": json.dumps(completion(prompt_token_ids=[1.5])).encode(),
    "tool calls as text": json.dumps(choice(message={"content": "fine", "tool_calls": "call"})).encode(),
    "tool call without a function": json.dumps(choice(message={"content": "", "tool_calls": [{"id": "1"}]})).encode(),
    "function as text": json.dumps(choice(message={"content": "", "tool_calls": [{"function": "f"}]})).encode(),
    "function without a name": json.dumps(choice(message={"tool_calls": [{"function": {"name": ""}}]})).encode(),
    "arguments as list": json.dumps(
        choice(message={"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]})
    ).encode(),
    "error without answer": b'{"error": {"message": "oops"}}',
}
# name -> the bytes on the wire
REPLIES: dict[str, bytes] = {
    "no http": b"hello\r\n\r\n",
    "wrong length": http(good(), length=10_000),
    "negative length": http(good(), length=-5),
    "redirect": http(b"", status="302 Found", headers="Location: http://127.0.0.1:9/\r\n"),
    "compressed": http(good(), headers="Content-Encoding: gzip\r\n"),
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
}


def number_in(body: bytes) -> int | None:
    """Which reply a request asks for; None: a good one."""
    text = json.loads(body)["messages"][-1]["content"]
    return int(text.removeprefix("reply ")) if text.startswith("reply ") else None


def answering(replies: list[bytes], fine: bytes):
    """A server whose answer to `reply N` is the Nth reply, and `fine` to anything else."""

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path.endswith("/models"):
            writer.write(http(MODELS))
        elif path.endswith("/metrics"):
            writer.write(http(b"vllm:spec_decode_num_drafts_total NaN\nvllm:spec_decode_num_drafts_total many\n"))
        else:
            number = number_in(body)
            writer.write(fine if number is None else replies[number])

    return handler


def test_regeneration_keeps_the_other_rows(tmp_path):
    names = [*BODIES, *WHOLE_BODIES, *REPLIES]
    replies = [*map(http, [*BODIES.values(), *WHOLE_BODIES.values()]), *REPLIES.values()]
    assert len(names) > 40
    asked = [f"reply {number}" for number in range(len(names))] + ["good one", "good two"]
    rows = [{"id": text, "conversations": [{"from": "human", "value": text}]} for text in asked]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(answering(replies, http(good()))) as url:
        regenerate(
            RegenerateArgs(
                prompts=PromptSourceSettings(data=str(tmp_path / "in.jsonl"), max_reject_share=1.0),
                output_dir=tmp_path / "out",
                engines=EngineSettings(server=(url,), max_attempts=1, concurrency=8),
            )
        )
    kept = [json.loads(line) for line in (tmp_path / "out" / "shard-00000.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == ["good one", "good two"]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {names[int(row["id"].removeprefix("reply "))]: row["reason"] for row in rejects}
    assert set(reasons) == set(names)
    of_transport = {name for name, reason in reasons.items() if reason != "malformed answer"}
    assert of_transport == set(REPLIES) - {"compressed"}


def stream_of(name: str, body: bytes) -> bytes:
    """A whole reply's fault as a stream's: the document is a chunk, its message the delta."""
    chunk = body.replace(b'"message"', b'"delta"')
    end = event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}})
    return http(event(chunk.replace(b"\n", b" ")) + end + b"data: [DONE]\n\n")


STREAMED_WELL = ("choices missing", "no choices", "message missing")  # chunks may lack these


def test_the_server_benchmark_measures_the_other_questions(tmp_path):
    names = [name for name in BODIES if name not in STREAMED_WELL] + ["no usage", "error in the stream", *REPLIES]
    replies = [stream_of(name, BODIES[name]) for name in BODIES if name not in STREAMED_WELL]
    replies += [
        http(event({"choices": [{"delta": {"content": "x"}}]})),
        http(event({"error": {"message": "oops", "code": [1]}})),
        *REPLIES.values(),
    ]
    assert len(names) > 40
    fine = stream_of("good", good())
    asked = [f"reply {number}" for number in range(len(names))] + ["good one", "good two"]
    lines = [json.dumps({"question_id": text, "turns": [text]}) + "\n" for text in asked]
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    with serving(answering(replies, fine)) as url:
        args = BenchSettings(
            model=ModelSettings(target="target", mode="baseline"),
            prompts=QuestionSettings(bench_name=(str(tmp_path / "odd.jsonl"),)),
            sampling=SamplingSettings(temperature=0.0),
            output=ReportSettings(output_dir=tmp_path / "out"),
            server=ServedSettings(backend="server", baseline_url=url, concurrency=(4,)),
        )
        with pytest.raises(UserError, match=r"In all \d+ questions failed and are left out"):
            bench(args)
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert sorted(row["answers"]) == ["good one", "good two"]
    assert {names[int(question.removeprefix("reply "))] for question in row["failed"]} == set(names)
    assert row["answers"]["good one"][0]["text"] == "fine" and row["answers"]["good one"][0]["num_tokens"] == 4
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["sets"]["odd, 4 in flight"]
    assert figures["baseline"]["tokens"] == 8 and figures["questions"] == 2
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_benchmark_without_a_failure_ends_well(tmp_path):
    """Control: the same benchmark with good replies raises nothing."""
    (tmp_path / "even.jsonl").write_text(json.dumps({"question_id": "1", "turns": ["good"]}) + "\n")
    with serving(answering([], stream_of("good", good()))) as url:
        bench(
            BenchSettings(
                model=ModelSettings(target="target", mode="baseline"),
                prompts=QuestionSettings(bench_name=(str(tmp_path / "even.jsonl"),)),
                output=ReportSettings(output_dir=tmp_path / "out"),
                server=ServedSettings(backend="server", baseline_url=url),
            )
        )
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["failed"] == {}


def test_a_level_in_which_every_question_fails_is_not_kept(tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question_id": "1", "turns": ["reply 0"]}) + "\n")
    with serving(answering([http(b"<html>")], b"")) as url:
        args = BenchSettings(
            model=ModelSettings(target="target", mode="baseline"),
            prompts=QuestionSettings(bench_name=(str(tmp_path / "odd.jsonl"),)),
            output=ReportSettings(output_dir=tmp_path / "out"),
            server=ServedSettings(backend="server", baseline_url=url),
        )
        with pytest.raises(UserError, match="every question failed.*no usage report"):
            bench(args)
    assert not (tmp_path / "out" / "results.jsonl").read_text()


@pytest.mark.parametrize(
    "models",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"data": []}',
        b'{"data": [{"id": 5}]}',
        b'{"data": [{}]}',
        b'{"data": {"id": "m"}}',
        DEEP,
    ],
)
def test_a_list_of_models_that_is_none(tmp_path, models):
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "1", "conversations": [{"from": "human", "value": "q"}]}))
    args = RegenerateArgs(
        prompts=PromptSourceSettings(data=str(tmp_path / "one.jsonl")),
        output_dir=tmp_path / "out",
        engines=EngineSettings(max_attempts=1),
    )

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(models if path.endswith("/models") else good()))

    with serving(handler) as url:
        with pytest.raises(UserError, match="Choose one with --model"):
            regenerate(dataclasses.replace(args, engines=dataclasses.replace(args.engines, server=(url,))))
        chosen = dataclasses.replace(args.engines, server=(url,), model="m")  # control: the name is all it lacks
        regenerate(dataclasses.replace(args, engines=chosen))


def test_metrics_that_are_no_numbers_are_left_out():
    """A NaN or an infinite counter ended the report with a traceback."""
    drafts, accepted = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
    odd = ["NaN", "Inf", "-Inf", "1e400", "-5", "many", "", "9" * 400]
    lines = [f'{drafts}{{engine="{number}"}} {value}' for number, value in enumerate(odd)]
    text = "\n".join([*lines, f"{drafts} 10", f"{accepted} 5"])
    found = acceptance_of(metrics_between({}, parse_metrics(text)))
    assert found is not None and found["tau"] == 1.5 and found["rounds"] == 10
    assert parse_metrics("\x00\n" + "x" * 10_000 + "\n{}{}{} 5\n") == {}


def test_errors_are_read_whatever_they_are():
    assert error_text(b'{"error": {"message": "too long"}}') == "too long"
    assert error_text(b'{"error": "too long"}') == "too long" == error_text(b'{"message": "too long"}')
    for odd in (b"", DEEP, b"\xff\xfe", b'{"error": [1]}', b"[]", b"null", b'{"error": {"message": 5}}'):
        assert len(error_text(odd)) <= 400
    assert "\x1b" not in error_text(b"\x1b]0;title\x07\x1b[2Jgone")  # would steer a terminal


def test_read_reply_names_what_is_wrong():
    with pytest.raises(ServerError, match="Expected `object`, got `array`.*starts"):
        read_reply(b"[]", Completion)
    assert read_reply(good(), Completion).choices[0].message.content == "fine"  # control
