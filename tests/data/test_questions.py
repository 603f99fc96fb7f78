"""What a conversation asks, and when the data's tool results answer the target's calls."""

import pytest

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.regeneration.questions import Exchange, prompt_digest, turns_of


def call(name: str, arguments, id: str | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | ({"id": id} if id else {})


def result(content: str, id: str | None = None) -> dict:
    return {"role": "tool", "content": content} | ({"tool_call_id": id} if id else {})


TALK = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Oslo"})]},
    result("rain"),
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "two"},
)


def test_turns_hold_the_question_and_the_datas_tool_exchanges():
    first, second = turns_of(Conversation("a", TALK), "not used: the data has a system message")
    assert [message["content"] for message in first.asked] == ["s", "one"]
    assert [(len(e.calls), [r["content"] for r in e.results]) for e in first.exchanges] == [(1, ["rain"])]
    assert [message["content"] for message in second.asked] == ["two"] and second.exchanges == []
    prompted = turns_of(Conversation("b", TALK[1:2]), "be brief")
    assert prompted[0].asked[0] == {"role": "system", "content": "be brief"}


def test_equal_calls_take_the_datas_results():
    """Equal as JSON: text or mapping, any order of keys and calls; the results bear the ids of the target's calls."""
    exchange = Exchange(
        [call("weather", {"city": "Oslo", "days": 2}, "old1"), call("clock", "{}", "old2")],
        [result("noon", "old2"), result("rain", "old1")],
    )
    asked = [call("clock", {}, "new1"), call("weather", '{"days": 2, "city": "Oslo"}', "new2")]
    assert exchange.results_for(asked) == [result("noon", "new1"), result("rain", "new2")]


@pytest.mark.parametrize(
    "calls",
    [
        [call("weather", {"city": "Bergen"})],  # other arguments: the result would be a lie
        [call("climate", {"city": "Oslo"})],
        [call("weather", {"city": "Oslo"}), call("weather", {"city": "Oslo"})],  # one result only
    ],
)
def test_other_calls_have_no_result(calls):
    exchange = Exchange([call("weather", {"city": "Oslo"})], [result("rain")])
    assert exchange.results_for([call("weather", {"city": "Oslo"})]) == [result("rain")]
    assert exchange.results_for(calls) is None


def test_calls_without_results_in_the_data_have_none():
    assert Exchange([call("weather", {})]).results_for([call("weather", {})]) is None


def test_what_cannot_be_asked_is_named():
    with pytest.raises(Reject, match="no user turn"):
        turns_of(Conversation("a", TALK[:1]), None)
    with pytest.raises(Reject, match="tool result without a call"):
        turns_of(Conversation("a", (TALK[1], result("rain"))), None)


def test_tools_are_part_of_the_question():
    """Two rows that ask the same with other tools are no duplicates."""
    plain = Conversation("a", TALK[1:2])
    assert prompt_digest(plain) == prompt_digest(Conversation("b", TALK[1:2], {"country": "no"}))
    assert prompt_digest(plain) != prompt_digest(Conversation("a", TALK[1:2], {"tools": [{"type": "function"}]}))
