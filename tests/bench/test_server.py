"""Servers measured through HTTP: a small real server streams answers and counts drafts as vLLM does."""

import dataclasses
import json

import pytest
from fakes.streaming_server import StreamingServer, starting

from fledge.bench.client import acceptance_of, metrics_between, parse_metrics
from fledge.bench.rows import read_rows
from fledge.bench.run import bench
from fledge.bench.settings import ServedSettings
from fledge.errors import UserError


@pytest.fixture
def start():
    """Run servers in a thread; returns the URL of each."""
    with starting() as go:
        yield go


@pytest.fixture
def server_args(make_args):
    def make(plain_url, eagle_url, *, concurrency=(1,), **flags):
        args = make_args(question_end=4, **flags)
        server = ServedSettings(backend="server", baseline_url=plain_url, eagle_url=eagle_url, concurrency=concurrency)
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


def test_speed_ups_by_category(start, server_args, tmp_path):
    """Of the answers' clocks; the server counts drafts for all requests together, so it tells no tau by category."""
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question_id": i, "category": name, "turns": [f"question {i}"]} for i, name in enumerate(("qa", "rag", "qa"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, eagle = StreamingServer(has_head=False), StreamingServer(has_head=True)
    args = server_args(start(plain), start(eagle), bench_name=(str(path),))
    bench(args)
    found = summary(args)["sets"]["mine, 1 in flight"]["categories"]
    assert {name: (one["questions"], one["tau"]) for name, one in found.items()} == {"qa": (2, None), "rag": (1, None)}
    assert all(one["speedup"]["value"] > 1.2 for one in found.values())


@pytest.mark.parametrize("modes", [("eagle", "baseline"), ("baseline", "eagle")])
def test_servers_asked_one_after_the_other_are_put_together(start, server_args, modes):
    """Two servers seldom fit on one machine at once."""
    urls = {"baseline": start(StreamingServer(has_head=False)), "eagle": start(StreamingServer(has_head=True))}
    for mode in modes:
        given = {**dict.fromkeys(urls), mode: urls[mode]}
        args = server_args(given["baseline"], given["eagle"], mode=mode, concurrency=(1, 2))
        bench(args)
    sets = summary(args)["sets"]
    assert list(sets) == ["quick, 1 in flight", "quick, 2 in flight"]
    assert all(figures["speedup"]["value"] > 1 and figures["acceptance"]["tau"] == 2.0 for figures in sets.values())


def test_requests_carry_the_settings_and_the_models_own_answers(start, server_args, monkeypatch):
    plain = StreamingServer(has_head=False)
    args = server_args(start(plain), None, mode="baseline", temperature=0.5, top_p=0.9, sample_top_k=7,
                       max_new_tokens=55, thinking="off")  # fmt: skip
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

    from fledge.servers import processes as engine

    urls = {False: start(StreamingServer(has_head=False)), True: start(StreamingServer(has_head=True))}
    events = []

    @contextlib.contextmanager
    def running(servers):
        has_head = "--speculative-config" in servers[0].command
        events.append(("up", has_head, "--no-enable-prefix-caching" in servers[0].command))
        yield []
        events.append(("down", has_head))

    checked = []
    monkeypatch.setattr("fledge.export.servable.check_draft", lambda draft, target, tokens: checked.append(draft))
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
