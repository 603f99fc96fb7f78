"""Every shape of public data becomes the conversation that its model saw; nothing of it vanishes without a word."""

import json
import re

import pytest

from fledge.data.conversations import parse_row, read_conversations
from fledge.data.rejects import Reject, Rejects
from fledge.data.rows import Row
from fledge.errors import UserError

ARGUMENTS = {"city": "Oslo"}
TOOL = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}
OPENAI_TOOL = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


def parse(value: dict, data_format="auto"):
    return parse_row(Row("f.jsonl:1", "f-0", value), data_format)


def said(row: dict) -> list[tuple]:
    return [(message["role"], message["content"]) for message in parse(row).messages]


def user(text="Hi"):
    return {"role": "user", "content": text}


def assistant(text="Hello", **more):
    return {"role": "assistant", "content": text, **more}


QA = [("user", "Hi"), ("assistant", "Hello")]
PUBLIC_SHAPES = {
    "sharegpt": (
        {"id": "a_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, QA
    ),
    "ultrachat": ({"id": "0", "data": ["Hi", "Hello"]}, QA),
    "ultrachat_200k": ({"prompt": "Hi", "prompt_id": "f0", "messages": [user(), assistant()]}, QA),
    "tulu": ({"id": "t1", "messages": [user(), assistant()], "source": "flan"}, QA),
    "lmsys": (
        {"conversation_id": "c", "model": "vicuna", "conversation": [user(), assistant()], "turn": 1,
         "language": "English", "openai_moderation": [{"flagged": False}], "redacted": False},
        QA,
    ),
    "wildchat": (
        {"conversation_hash": "h", "conversation": [{**user(), "country": "US"}, assistant(toxic=False)]},
        QA,
    ),
    "oasst": ({"conversation": [{"role": "prompter", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]}, QA),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is ... Hi ... Hello"}, QA),
    "alpaca with input": (
        {"instruction": "Name it.", "input": "a dog", "output": "Rex"},
        [("user", "Name it.\n\na dog"), ("assistant", "Rex")],
    ),
    "alpaca with history": (
        {"instruction": "More?", "input": "", "output": "No.", "history": [["Hi", "Hello"]], "system": "Be brief."},
        [("system", "Be brief."), *QA, ("user", "More?"), ("assistant", "No.")],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"},
        [("user", "Who?\n\nAnn came."), ("assistant", "Ann")],
    ),
    "openorca": (
        {"id": "o", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, [("system", "Be brief."), *QA]
    ),
    "guanaco": (
        {"text": "### Human: Hi### Assistant: Hello### Human: More?\n### Assistant: ### No.\n"},
        [*QA, ("user", "More?"), ("assistant", "### No.")],
    ),
    "swift": (
        {"query": "More?", "response": "No.", "history": [["Hi", "Hello"]]},
        [*QA, ("user", "More?"), ("assistant", "No.")],
    ),
    "a history of another kind": ({"question": "Hi", "answer": "Hello", "history": "19th century"}, QA),
    "metamath": ({"query": "Hi", "response": "Hello", "type": "x"}, QA),
    "trl prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, QA),
    "trl conversational": ({"prompt": [user()], "completion": [assistant()]}, QA),
    "prompt alone": ({"prompt": "Hi"}, [("user", "Hi")]),
    "openai": ({"messages": [{"role": "developer", "content": "Be brief."}, user(), assistant()]},
               [("system", "Be brief."), *QA]),
    "messages as text": ({"messages": json.dumps([user(), assistant()])}, QA),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC_SHAPES)
def test_public_shapes(name):
    row, expected = PUBLIC_SHAPES[name]
    assert said(row) == expected


@pytest.mark.parametrize("name", PUBLIC_SHAPES)
def test_a_column_that_became_messages_is_not_in_the_meta_too(name):
    """Regenerated rows repeated such columns: the answer of another model stood beside the new one."""
    conversation = parse(PUBLIC_SHAPES[name][0])
    assert not conversation.used & conversation.meta.keys()
    texts = json.dumps([value for key, value in conversation.meta.items() if key not in ("prompt", "text")])
    assert "Hello" not in texts


def test_glaive_tool_calls_of_sharegpt():
    """`function_call` was an unknown role; LLaMA-Factory's and APIGen-MT's rows are made of it."""
    call = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"}, {"from": "function_call", "value": call},
            {"from": "observation", "value": '{"t": 3}'}, {"from": "gpt", "value": "3 degrees"},
        ],
        "system": "Be brief.", "tools": json.dumps([TOOL]),
    }  # fmt: skip
    conversation = parse(row)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation.messages[3]["content"] == '{"t": 3}'
    assert conversation.tools == [OPENAI_TOOL]


def test_xlam_answers_are_calls():
    row = {"id": 0, "query": "Weather?", "answers": json.dumps([CALL["function"]]), "tools": json.dumps([TOOL])}
    conversation = parse(row)
    assert conversation.messages == (user("Weather?"), assistant("", tool_calls=[CALL]))
    assert conversation.tools == [OPENAI_TOOL]


def test_hermes_states_its_tools_in_the_system_text():
    """Its `tools` column says them again: a template would write them twice."""
    turns = [
        {"from": "system", "value": f"You call functions. <tools> {json.dumps([OPENAI_TOOL])} </tools>"},
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "weather"}\n</tool_call>'},
    ]
    tools = json.dumps([OPENAI_TOOL])
    assert parse({"conversations": turns, "tools": tools}).tools == []
    assert parse({"conversations": turns[1:], "tools": tools}).tools == [OPENAI_TOOL]


def test_the_system_column_is_used():
    """`{"conversations": [...], "system": "Talk like a pirate."}` trained without the pirate."""
    row = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "system": "Be brief.",
    }
    assert said(row) == [("system", "Be brief."), *QA] and parse(row).meta == {}
    assert said({**row, "system": " "}) == QA


def test_a_system_text_in_both_places_must_be_the_same():
    messages = [{"role": "system", "content": "Be brief."}, user(), assistant()]
    assert said({"messages": messages, "system": "Be brief.\n"}) == [("system", "Be brief."), *QA]
    with pytest.raises(Reject, match="fields contradict: the system text"):
        parse({"messages": messages, "system": "Be long."})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_has_one_name(name):
    message = parse({"messages": [user(), assistant(**{name: "Hm."})]}).messages[1]
    assert message == assistant(reasoning_content="Hm.")


def test_reasoning_in_parts_and_in_a_column():
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}]
    expected = assistant(reasoning_content="Hm.")
    assert parse({"messages": [user(), assistant(parts)]}).messages[1] == expected
    column = parse({"question": "Hi", "answer": "Hello", "reasoning": "Hm."})
    assert column.messages[1] == expected and "reasoning" not in column.meta
    with pytest.raises(Reject, match="column 'reasoning' stands beside 2 answers"):
        parse({"messages": [user(), assistant(), user(), assistant()], "reasoning": "Hm."})


def test_reasoning_under_two_names_must_agree():
    """vLLM answers with both names; two different texts cannot both be what was thought."""
    assert parse({"messages": [user(), assistant(reasoning="Hm.", reasoning_content="Hm.")]})
    with pytest.raises(Reject, match="reasoning is given twice"):
        parse({"messages": [user(), assistant(reasoning="Hm.", thinking="No.")]})


def test_an_answer_cut_while_reasoning_may_be_empty():
    assert parse({"messages": [user(), assistant("", reasoning="Hm")]}).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("marks", "trained"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False), ({"loss": True}, True),
     ({"weight": 1, "train": False}, False), ({}, True)],
)  # fmt: skip
def test_marks_of_answers_that_are_not_trained(marks, trained):
    """`weight: 0` was a field like any other: the answer was supervised."""
    message = parse({"messages": [user(), assistant(**marks)]}).messages[1]
    assert message == (assistant() if trained else assistant(train=False))


def test_arguments_of_calls_stay_as_written_and_empty_lists_vanish():
    """Arguments as text were encoded a second time, and `tool_calls: []` made templates write an empty call."""
    text = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert parse({"messages": [user(), assistant(None, tool_calls=[text])]}).messages[1]["tool_calls"] == [text]
    assert "tool_calls" not in parse({"messages": [user(), assistant(tool_calls=[])]}).messages[1]
    old = assistant(None, function_call={"name": "weather", "arguments": ARGUMENTS})
    assert parse({"messages": [user(), old]}).messages[1] == assistant("", tool_calls=[CALL])


def test_template_arguments_and_switches():
    kwargs = parse({"messages": [user()], "chat_template_kwargs": '{"enable_thinking": false}'}).template_kwargs
    assert kwargs == {"enable_thinking": False}
    row = parse({"messages": [user()], "reasoning_effort": "high", "enable_thinking": True})
    assert row.template_kwargs == {"reasoning_effort": "high", "enable_thinking": True}
    assert row.meta == {"chat_template_kwargs": row.template_kwargs}


def test_tools_under_their_older_name():
    """OpenAI's `functions` stayed a column of the row: the head learned calls of tools that no prompt had."""
    row = {"messages": [user("Weather?"), assistant(None, function_call={"name": "weather"})], "functions": [TOOL]}
    assert parse(row).tools == [OPENAI_TOOL] and "functions" not in parse(row).meta
    assert parse({**row, "tools": json.dumps([TOOL])}).tools == [OPENAI_TOOL]
    with pytest.raises(Reject, match="tools of column 'functions' are not those of column 'tools'"):
        parse({**row, "tools": []})


def test_tools_of_a_system_message():
    """They stayed a field of the message, which no template reads."""
    system = {"role": "system", "content": "Be brief.", "tools": [TOOL]}
    found = parse({"messages": [system, user(), assistant()]})
    assert found.tools == [OPENAI_TOOL] and "tools" not in found.messages[0]
    with pytest.raises(Reject, match="tools of the system message are not those of column 'tools'"):
        parse({"messages": [system, user(), assistant()], "tools": []})


@pytest.mark.parametrize(
    ("mark", "trained"),
    [({"weight": 0}, False), ({"train": False}, False), ({"weight": 1}, True), ({"weight": 0.3}, True), ({}, True)],
)
def test_marks_of_a_whole_row(mark, trained):
    """A row of weight 0 was trained."""
    found = parse({"messages": [user(), assistant()], **mark})
    assert found.messages == (user(), assistant() if trained else assistant(train=False))
    assert found.meta == (mark if trained else {})


@pytest.mark.parametrize("name", ["thoughts", "reasoning"])
def test_reasoning_that_is_no_text_is_not_dropped(name):
    with pytest.raises(Reject, match=f"column '{name}' holds reasoning, which is a text; found .'Hm.'.$"):
        parse({"messages": [user(), assistant()], name: ["Hm."]})


@pytest.mark.parametrize(
    "switch", [{"enable_thinking": "false"}, {"thinking": {"type": "on"}}, {"reasoning_effort": 3}]
)
def test_a_switch_of_another_type_is_no_column_of_the_rows_own(switch):
    """`"enable_thinking": "false"` out of a table was kept beside the row, which was rendered with thinking on."""
    ((name, value),) = switch.items()
    with pytest.raises(Reject, match=f"{name} is .*, found {re.escape(repr(value))}"):
        parse({"messages": [user()], **switch})
    with pytest.raises(Reject, match=f"{name} is "):
        parse({"messages": [user()], "chat_template_kwargs": switch})
    assert parse({"messages": [user()], name: None}).meta == {}


def test_what_regenerate_notes_beside_its_arguments_is_not_one():
    row = {"messages": [user()], "thinking": True, "chat_template_kwargs": {"enable_thinking": True}}
    assert parse(row).template_kwargs == {"enable_thinking": True}


def test_consecutive_user_messages_are_one():
    """Many templates refuse two in a row, and the rows were rejected for all of them."""
    assert said({"messages": [user("A"), user("B"), assistant()]}) == [("user", "A\n\nB"), ("assistant", "Hello")]
    picture = [{"type": "image", "image": "a.png"}]
    (joined,) = parse({"messages": [user(picture), user("B")]}).messages
    assert [part["type"] for part in joined["content"]] == ["image", "text", "text"]


def test_own_fields_stay():
    row = {"messages": [user(), assistant()], "meta": {"a": 1}, "country": "NO"}
    assert parse(row).meta == {"meta": {"a": 1}, "country": "NO"}


def test_embedded_pictures():
    """A picture as `{"bytes": base64}` ended the run with a traceback."""
    part = {"type": "image", "image": {"bytes": "iVBORw0KGgo=", "path": None}}
    (message,) = parse({"messages": [user([part, {"type": "text", "text": "What?"}])]}).messages
    assert message["content"][0] == {"type": "image", "image": "data:image/png;base64,iVBORw0KGgo="}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"messages": "[{", "id": 1}, "not JSON", "messages is a text"),
        ({"messages": [user()], "tools": "{"}, "not JSON", "tools is a text"),
        ({"messages": [user()], "tools": [1]}, "unknown tools", "tool 0"),
        ({"messages": [user()], "tools": {"function": None}}, "unknown tools", "tool 0"),
        ({"instruction": "x", "history": True}, "unknown format", "history is a list, found bool"),
        ({"messages": [user()], "chat_template_kwargs": "[]"}, "unknown format", "is an object, found list"),
        ({"messages": [user(), assistant(weight=0.5)]}, "unknown weight", "weight=0.5"),
        ({"messages": [user(), assistant(reasoning=["x"])]}, "unknown format", "found list"),
        ({"messages": [user(), assistant(tool_calls=[{"function": {}}])]}, "unknown tool call", "without the name"),
        ({"messages": [user(), assistant(tool_calls={"name": "f", "args": '"{}"'})]}, "unknown tool call", "JSON"),
        ({"messages": [user()], "conversations": [user("Other")]}, "two conversations", "'messages' differ"),
        ({"instruction": "x", "history": [["a"]]}, "unknown format", "history"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_rejected_by_name(row, reason, detail):
    with pytest.raises(Reject) as caught:
        parse(row)
    assert caught.value.reason == reason and detail in caught.value.detail


def test_the_same_conversation_in_two_columns_is_one():
    """Rows of an older regenerate hold both; only rows in which they differ are in doubt."""
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    row["messages"] = [user(), assistant()]
    assert said(row) == QA and parse(row).meta == {}
    assert said({**row, "messages": [user("Other")]} | {"conversations": None}) == [("user", "Other")]


def read(path, **kwargs):
    rejects = Rejects(max_share=0.5)
    return list(read_conversations(str(path), rejects=rejects, **kwargs)), rejects


def test_a_column_map(write_rows):
    path = write_rows([{"dialog": [user(), assistant()], "persona": "Be brief.", "x": 1}])
    (found,), _ = read(path, columns=("system=persona", "messages=dialog"))
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"] and found.meta == {"x": 1}


def test_a_column_map_that_fits_no_row_or_names_nothing_we_read(write_rows):
    path = write_rows([{"messages": [user(), assistant()]}])
    with pytest.raises(UserError, match="no row has the column persona"):
        read(path, columns=("system=persona",))
    with pytest.raises(UserError, match=r"--columns sytem=persona: .*did you mean.*system|--columns sytem=persona"):
        read(path, columns=("sytem=persona",))
    with pytest.raises(UserError, match="--columns system: needed is OURS=YOURS"):
        read(path, columns=("system",))


def test_several_answers_of_one_id(write_rows):
    """Rows of one prompt sampled several times share its id: all but the first were rejected."""
    rows = [{"id": "p", "messages": [user(), assistant(text)]} for text in ("A", "B", "A", "C")]
    path = write_rows([*rows, {"id": "q", "messages": [user(), assistant("A")]}])
    found, rejects = read(path, repeated_ids="answers")
    assert [c.id for c in found] == ["p", "p#answer2", "p#answer3", "q"] and rejects.counts == {"duplicate id": 1}
    with pytest.raises(UserError, match="--repeated-ids answers"):
        read(path)
