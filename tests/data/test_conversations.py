"""Rows of every format become the same conversation; every bad row is rejected for the reason stated."""

import pytest

from fledge.data.conversations import parse_row, read_conversations
from fledge.data.rejects import Reject, Rejects
from fledge.data.rows import Row
from fledge.errors import UserError

SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
    ]
}  # fmt: skip
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Hello"},
    ]
}
PLAIN = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))


def parse(value: dict, data_format="auto"):
    return parse_row(Row("f.jsonl:1", "f-0", value), data_format)


def plain(conversation) -> tuple:
    return tuple((message["role"], message["content"]) for message in conversation.messages)


@pytest.mark.parametrize("row", [SHAREGPT, MESSAGES])
def test_formats_agree(row):
    assert plain(parse(row)) == PLAIN


def test_ultrachat_lists_of_strings_alternate():
    conversation = parse({"id": "7", "data": ["Hi", "Hello", "More?", "No."]}, "ultrachat")
    assert plain(conversation) == (("user", "Hi"), ("assistant", "Hello"), ("user", "More?"), ("assistant", "No."))
    assert conversation.id == "7"


@pytest.mark.parametrize("name", ["human", "Human", "user", "prompter"])
def test_role_aliases(name):
    assert parse({"conversations": [{"from": name, "value": "Hi"}]}).messages[0]["role"] == "user"


def test_the_rest_of_the_row_and_of_a_message_is_kept():
    row = {"id": 5, "source": "x", "finish_reason": "length", **MESSAGES}
    row["messages"] = [*MESSAGES["messages"][:2], {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}]
    conversation = parse(row)
    assert conversation.meta == {"id": 5, "source": "x", "finish_reason": "length"}
    assert conversation.id == "5" and conversation.where == "f.jsonl:1"
    assert conversation.messages[2]["reasoning_content"] == "Hm"


def test_a_row_without_an_id_gets_file_and_position():
    assert parse(SHAREGPT).id == "f-0"


def test_images_stay_parts():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == parts


def user(text="Hi"):
    return {"role": "user", "content": text}


def assistant(text="Hello"):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"messages": []}, "empty conversation", "no messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "empty conversation", "system message only"),
        ({"messages": [user(), assistant("")]}, "empty answer", "message 1"),
        ({"messages": [user(), assistant(" \n")]}, "empty answer", "message 1"),
        ({"messages": [user("")]}, "empty message", "message 0"),
        ({"messages": [assistant()]}, "roles out of order", "message 0 is assistant at the start"),
        ({"messages": [user(), assistant(), assistant()]}, "roles out of order", "message 2"),
        ({"messages": [user(), {"role": "system", "content": "x"}]}, "roles out of order", "message 1 is system"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role", "'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown role", "None"),
        ({"messages": ["Hi"]}, "unknown format", "message 0 is str"),
        ({"messages": [{"role": "user", "content": 3}]}, "unknown format", "type int"),
        ({"messages": [{"role": "user", "content": None}]}, "unknown format", "NoneType"),
        ({"text": "Hi"}, "unknown format", "found keys ['text']"),
        ({"messages": "Hi"}, "unknown format", "needs a list"),
    ],
)
def test_bad_rows_are_rejected_with_their_reason(row, reason, detail):
    with pytest.raises(Reject) as caught:
        parse(row)
    assert caught.value.reason == reason and detail in caught.value.detail


def test_tool_results_stand_between_answers():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    conversation = parse({"messages": [user(), call, {"role": "tool", "content": "42"}, assistant()]})
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_stated_format_is_not_guessed_around():
    with pytest.raises(Reject, match="'conversations'"):
        parse(MESSAGES, "sharegpt")


def read(path, **kwargs):
    rejects = kwargs.pop("rejects", None) or Rejects()
    return list(read_conversations(str(path), rejects=rejects, **kwargs)), rejects


def test_few_bad_rows_are_counted_and_written(write_rows, tmp_path):
    path = write_rows([{"id": i, **MESSAGES} for i in range(39)] + ["{broken"])
    rejects = Rejects(tmp_path / "rejects.jsonl")
    conversations, _ = read(path, rejects=rejects)
    assert len(conversations) == 39 and rejects.seen == 40 and rejects.counts == {"broken row": 1}
    assert f"{path}:40" in (tmp_path / "rejects.jsonl").read_text()


def test_many_bad_rows_stop_the_run_naming_the_first(write_rows):
    path = write_rows([MESSAGES, "{broken", MESSAGES, {"id": 1}])
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert f"{path}:2: not valid JSON" in message and "2 of 4 rows (50.0%)" in message and "\n" not in message
    assert len(read(path, rejects=Rejects(max_share=0.5))[0]) == 2  # the share is the user's to choose


def test_a_file_of_another_format_stops_long_before_its_end(write_rows):
    rejects = Rejects()
    with pytest.raises(UserError, match="unknown format"):
        read(write_rows([{"text": "x"}] * 5000), rejects=rejects)
    assert rejects.seen < 500


def test_duplicate_ids_name_both_rows_across_files(write_rows, tmp_path):
    write_rows([{"id": "a", **MESSAGES}] + [MESSAGES] * 40, "d/1.jsonl")
    write_rows([{"id": "a", **MESSAGES}], "d/2.jsonl")
    _, rejects = read(tmp_path / "d")
    assert rejects.counts == {"duplicate id": 1}
    first = rejects.first["duplicate id"]
    assert "2.jsonl:1: id 'a' was already used at" in first and "1.jsonl:1;" in first


def test_an_empty_file_is_an_error(write_rows):
    with pytest.raises(UserError, match=r"data\.jsonl: no conversations \(0 rows read\)"):
        read(write_rows([""]))


def test_an_unknown_format_name_is_an_error(write_rows):
    with pytest.raises(UserError, match="'alpaca' is unknown: use one of auto, sharegpt, ultrachat, messages"):
        read(write_rows([MESSAGES]), data_format="alpaca")
