"""What of a row is sent, what is kept, and what of its old answers must not survive."""

import json

import pytest
from fakes.openai_server import FakeServer, ServerThread, answer_to
from regenerating import prompts, rejects_of, rows_of, run, write

from fledge.commands.parser import parse
from fledge.commands.regenerate import RegenerateArgs
from fledge.data.conversations import read_conversations
from fledge.data.rejects import Rejects
from fledge.data.samples import conversation_id
from fledge.errors import UserError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def calling(name: str, arguments, id: str = "c1") -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def start():
    threads: list[ServerThread] = []

    def begin(**options) -> ServerThread:
        threads.append(ServerThread(FakeServer(**options)))
        return threads[-1]

    yield begin
    for thread in threads:
        thread.stop()


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def test_own_fields_are_kept_and_never_sent(start, tmp_path):
    """A server with strict requests refused every row that carried a field of its own."""
    server = start()
    messages = [{"role": "user", "content": "one", "country": "no", "weight": 0}]
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": messages, "meta": {"n": 1}, "country": "fi"}])
    (row,) = run(data, tmp_path / "out", server.url, prompt={"data_format": "messages"})
    assert (row["meta"], row["country"], row["messages"][0]["country"]) == ({"n": 1}, "fi", "no")
    (body,) = server.server.bodies
    assert body["messages"] == [{"role": "user", "content": "one"}]
    assert not {"meta", "country"} & body.keys()


@pytest.mark.parametrize("data_format", ["auto", "messages", "sharegpt"])
def test_the_new_answer_is_the_only_one_left(start, tmp_path, data_format):
    """A row with `messages` and `conversations` kept the one that was not asked, and training read it first."""
    stale = {
        "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "STALE"}],
        "messages": talk(("user", "one"), ("assistant", "STALE")),
        "data": ["one", "STALE"],
        "prompt_ids": [1],
        "completion_ids": [2],
        "labels": [-100, 2],
    }
    data = write(tmp_path / "in.jsonl", [{"id": "a", **stale}])
    server = start(is_vllm=False)
    (row,) = run(data, tmp_path / "out", server.url, prompt={"data_format": data_format})
    assert "STALE" not in json.dumps(row) and not {"completion_ids", "prompt_ids", "labels"} & row.keys()
    (read,) = read_conversations(str(tmp_path / "out"), rejects=Rejects())
    assert [message["content"] for message in read.messages] == ["one", answer_to("one")]


def test_a_column_called_data_that_holds_no_conversation_is_kept(start, tmp_path):
    row = {"id": "a", "conversations": [{"from": "human", "value": "one"}], "data": {"source": "web"}}
    (row,) = run(write(tmp_path / "in.jsonl", [row]), tmp_path / "out", start().url)
    assert row["data"] == {"source": "web"}


def test_tools_and_template_variables_of_the_row_are_sent_and_recorded(start, tmp_path):
    """They were left out of the request: the answers were those of a model without tools, and training then rendered
    the tools before them."""
    server = start()
    kwargs = {"reasoning_effort": "high", "builtin_tools": ["python"]}
    data = write(tmp_path / "in.jsonl", [
        {"id": "a", "messages": talk(("user", "one")), "tools": [WEATHER], "chat_template_kwargs": kwargs},
        {"id": "b", "messages": talk(("user", "two"))},
    ])  # fmt: skip
    with_tools, plain = run(data, tmp_path / "out", server.url)
    sent = {body["messages"][0]["content"]: body for body in server.server.bodies}
    assert sent["one"]["tools"] == with_tools["tools"] == [WEATHER]
    assert sent["one"]["chat_template_kwargs"] == with_tools["chat_template_kwargs"] == kwargs
    assert sent["one"]["reasoning_effort"] == "high"
    assert not {"tools", "chat_template_kwargs", "reasoning_effort"} & sent["two"].keys()
    assert not {"tools", "chat_template_kwargs"} & plain.keys()


def test_a_thinking_choice_wins_over_the_rows_own(start, tmp_path):
    row = {"id": "a", "messages": talk(("user", "one")), "chat_template_kwargs": {"enable_thinking": True, "x": 1}}
    server = start()
    (row,) = run(write(tmp_path / "in.jsonl", [row]), tmp_path / "out", server.url, answer={"thinking": "off"})
    told = {"enable_thinking": False, "thinking": False, "x": 1}  # the server's template is not known here
    assert row["chat_template_kwargs"] == server.server.bodies[0]["chat_template_kwargs"] == told


def weather_reply(arguments: str = '{"city": "Oslo"}'):
    """A target that calls the weather tool until it has a result."""

    def reply(body: dict) -> dict:
        if body["messages"][-1]["role"] == "tool" or not body.get("tools"):
            return {}
        call = calling("weather", arguments, "new")
        return {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}

    return reply


def tool_rows(tmp_path, *more: tuple[str, str]):
    messages = talk(("user", "Oslo?"), ("assistant", ""), ("tool", "rain"), ("assistant", "OLD"), *more)
    messages[1]["tool_calls"] = [calling("weather", {"city": "Oslo"}, "old")]
    messages[2] |= {"tool_call_id": "old", "name": "weather"}
    return write(tmp_path / "in.jsonl", [{"id": "a", "messages": messages, "tools": [WEATHER]}])


def test_the_datas_tool_results_answer_the_same_calls(start, tmp_path):
    """Every row with tools was rejected."""
    server = start(reply=weather_reply())
    (row,) = run(tool_rows(tmp_path, ("user", "And then?")), tmp_path / "out", server.url)
    call = calling("weather", '{"city": "Oslo"}', "new")
    result = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "new"}
    assert row["messages"][:3] == [
        {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "", "tool_calls": [call]}, result,
    ]  # fmt: skip
    assert server.server.bodies[1]["messages"] == row["messages"][:3]
    assert row["messages"][3] == {"role": "assistant", "content": answer_to("rain")}
    assert row["messages"][5]["tool_calls"] == [call]  # the second question gets a call, too, and has no result
    assert (row["turns_left_out"], row["turns_left_out_because"]) == (1, "tool call without a result")
    assert len(row["messages"]) == 6 and "OLD" not in json.dumps(row)


def test_another_call_ends_the_conversation(start, tmp_path):
    server = start(reply=weather_reply('{"city": "Bergen"}'))
    (row,) = run(tool_rows(tmp_path, ("user", "And then?")), tmp_path / "out", server.url)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["turns_left_out"] == 2 and "rain" not in json.dumps(row) and row["finish_reason"] == "stop"
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["turns left out: tool call without a result"] == 2


def test_an_answer_without_the_call_goes_on_with_the_next_question(start, tmp_path):
    data, prompt = tool_rows(tmp_path, ("user", "And then?")), {"data_format": "messages"}
    (row,) = run(data, tmp_path / "out", start().url, prompt=prompt)
    contents = [message["content"] for message in row["messages"]]
    assert contents == ["Oslo?", answer_to("Oslo?"), "And then?", answer_to("And then?")]
    assert "turns_left_out" not in row


def test_a_call_that_ends_the_data_too_is_complete(start, tmp_path):
    messages = talk(("user", "Oslo?"), ("assistant", ""))
    messages[1]["tool_calls"] = [calling("weather", {"city": "Bergen"})]
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": messages, "tools": [WEATHER]}])
    (row,) = run(data, tmp_path / "out", start(reply=weather_reply()).url)
    assert len(row["messages"]) == 2 and row["messages"][1]["tool_calls"] and "turns_left_out" not in row


@pytest.mark.parametrize("truncated, kept", [("keep", 1), ("drop", 0)])
def test_an_answer_cut_while_reasoning_is_cut_like_any_other(start, tmp_path, truncated, kept):
    """Such answers were always rejected, whatever --truncated said."""

    def reply(body: dict) -> dict:
        return {"message": {"content": None, "reasoning_content": "Let me see"}, "finish_reason": "length"}

    data = prompts(tmp_path / "in.jsonl", "one")
    thinking = start(reply=reply)
    if not kept:
        with pytest.raises(UserError, match="no row was answered"):
            run(data, tmp_path / "out", thinking.url, answer={"truncated": truncated})
        assert rejects_of(tmp_path / "out") == [("r0", "answer cut")]
        return
    (row,) = run(data, tmp_path / "out", thinking.url, answer={"truncated": truncated})
    assert row["finish_reason"] == "length"
    assert row["conversations"][1] == {"from": "gpt", "value": "", "reasoning_content": "Let me see"}


def test_reasoning_is_sent_back_under_both_of_its_names(start, tmp_path):
    """The newest vLLM reads `reasoning`, older ones and SGLang `reasoning_content`: earlier thoughts were lost."""
    server = start(reply=lambda body: {"message": {"reasoning": "Hm"}})
    data = write(
        tmp_path / "in.jsonl", [{"id": "a", "messages": talk(("user", "1"), ("assistant", "x"), ("user", "2"))}]
    )
    (row,) = run(data, tmp_path / "out", server.url)
    sent = server.server.bodies[1]["messages"][1]
    assert (sent["reasoning"], sent["reasoning_content"]) == ("Hm", "Hm")
    assert row["conversations"][1]["reasoning_content"] == "Hm" and "reasoning" not in row["conversations"][1]


def test_the_sampling_that_generation_config_asks_for_is_sent_and_recorded(start, tmp_path, capfd):
    """A server was left to sample with the model's repetition penalty, and the row said nothing of it."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "generation_config.json").write_text('{"repetition_penalty": 1.05, "top_k": 20, "temperature": 0.6}')
    server, data = start(), prompts(tmp_path / "in.jsonl", "one")
    prompt = {"target": str(target)}
    (row,) = run(data, tmp_path / "out", server.url, prompt=prompt)
    asked = {"repetition_penalty": 1.05, "top_k": 20}
    assert server.server.bodies[0].items() >= asked.items() and row["sampling"].items() >= asked.items()
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["generation_config"] == {**asked, "temperature": 0.6}
    told = capfd.readouterr()
    assert "sampling: temperature 0.7, top_p 1, repetition_penalty 1.05, top_k 20" in told.out + told.err
    assert "asks for temperature 0.6, which is not used here" in " ".join((told.out + told.err).split())
    (row,) = run(
        data, tmp_path / "flags", server.url, prompt=prompt, answer={"sample_top_k": 0, "repetition_penalty": 1.0}
    )
    assert server.server.bodies[1]["top_k"] == -1 and server.server.bodies[1]["repetition_penalty"] == 1.0
    assert row["sampling"]["top_k"] == 0


def test_several_samples_of_a_prompt(start, tmp_path):
    server, data = start(), prompts(tmp_path / "in.jsonl", "one", "two", "three", "one")
    rows = run(data, tmp_path / "out", server.url, prompt={"samples_per_prompt": 3, "deduplicate": True})
    assert [row["id"] for row in rows] == [f"r{i}#answer{k}" for i in range(3) for k in (1, 2, 3)]
    assert rejects_of(tmp_path / "out") == [(f"r3#answer{k}", "duplicate prompt") for k in (1, 2, 3)]
    seeds = [body["seed"] for body in server.server.bodies]
    assert len(set(seeds)) == 9 and server.server.asked == {"one": 3, "two": 3, "three": 3}
    read = list(read_conversations(str(tmp_path / "out"), rejects=Rejects()))  # no duplicate ids
    assert [conversation_id(conversation.id) for conversation in read] == [f"r{i}" for i in range(3) for _ in range(3)]


def test_samples_resume_where_they_were(start, tmp_path):
    """Rows of one prompt that are missing are asked with the draws they would have had."""
    questions = [f"q{i}" for i in range(4)]
    options = {"prompt": {"samples_per_prompt": 3, "max_reject_share": 1.0}, "shard_size": 5}
    whole = run(prompts(tmp_path / "in.jsonl", *questions), tmp_path / "whole", start().url, **options)
    failing = start(reply=lambda body: {"finish_reason": "content_filter"} if body["seed"] % 2 else {})
    part = run(tmp_path / "in.jsonl", tmp_path / "part", failing.url, **options)
    assert 0 < len(part) < 12
    partial = tmp_path / "part"
    again = run(tmp_path / "in.jsonl", partial, start().url, **options, engine={"retry_rejects": True})
    assert again == whole
    with pytest.raises(UserError, match="samples_per_prompt was 3, now None"):
        run(tmp_path / "in.jsonl", partial, "127.0.0.1:9", prompt={"max_reject_share": 1.0}, shard_size=5)


def test_several_equal_answers_are_refused(tmp_path):
    data = prompts(tmp_path / "in.jsonl", "one")
    with pytest.raises(UserError, match="several answers at temperature 0 would all be the same"):
        run(data, tmp_path / "out", "127.0.0.1:9", prompt={"samples_per_prompt": 2}, answer={"temperature": "0"})


def test_one_of_several_answers_stays_with_the_others():
    assert conversation_id("a#answer12") == conversation_id("a#answer3#turn4") == conversation_id("a") == "a"
    assert conversation_id("a#answers") == "a#answers" and conversation_id("#answer") == "#answer"


def test_a_finished_run_needs_no_server(start, tmp_path, capfd):
    """It asked for servers first, and failed where they were gone."""
    server, data = start(), prompts(tmp_path / "in.jsonl", "one", "two")
    rows = run(data, tmp_path / "out", server.url)
    server.stop()
    capfd.readouterr()
    assert run(data, tmp_path / "out", server.url) == rows
    told = capfd.readouterr()
    assert "all 2 rows are there already; nothing is asked" in told.out + told.err
    prompts(data, "one", "two", "three")
    with pytest.raises(UserError, match="holds a run with other settings: .*input_rows was 2, now 3"):
        run(data, tmp_path / "out", server.url)


def test_an_unfinished_run_without_a_server_still_fails(start, tmp_path):
    server, data = start(), prompts(tmp_path / "in.jsonl", "one", "q [fault: 500]")
    loose = {"max_reject_share": 1.0}
    run(data, tmp_path / "out", server.url, prompt=loose)
    server.stop()
    with pytest.raises(UserError, match="no server answers"):
        run(data, tmp_path / "out", server.url, prompt=loose, engine={"retry_rejects": True})
    assert len(rows_of(tmp_path / "out")) in (0, 1)  # the answered row waits in the journal


@pytest.mark.parametrize("flag, value", [("--top-k", "-2"), ("--min-p", "1.5"), ("--repetition-penalty", "0.0")])
def test_sampling_out_of_range_is_refused(flag, value):
    with pytest.raises(UserError, match=flag):
        parse(RegenerateArgs, ["--data", "x", "--output-dir", "y", flag, value], prog="fledge regenerate")


def test_several_answers_at_temperature_0_are_refused(tmp_path):
    data = prompts(tmp_path / "in.jsonl", "one")
    with pytest.raises(UserError, match="--samples-per-prompt is 2 at --temperature 0"):
        run(data, tmp_path / "out", "127.0.0.1:9", prompt={"samples_per_prompt": 2}, answer={"temperature": "0"})
