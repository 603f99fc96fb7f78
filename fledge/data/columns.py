"""Which columns of a row hold its conversation, and what they say about it.

Knows the shapes of public data: a list of turns (ShareGPT, OpenAI, UltraChat, LMSYS), a prompt and an answer (TRL,
Alpaca, Dolly, OpenOrca, xLAM), one text (Guanaco), and what may stand beside them: a system text, tools, template
arguments, reasoning. Every column that is read here is used up; the others are the row's own and stay in its meta.
"""

import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal

from fledge.data.messages import REASONING_KEYS, one_text
from fledge.data.rejects import Reject
from fledge.data.tool_calls import decoded, tool_calls_of, tools_of
from fledge.errors import UserError, nearest

DataFormat = Literal["auto", "sharegpt", "ultrachat", "messages"]
FORMAT_KEYS = {
    "auto": ("conversations", "conversation", "messages", "data"),
    "sharegpt": ("conversations", "conversation"),
    "ultrachat": ("messages", "data"),
    "messages": ("messages",),
}
TURN_COLUMNS = frozenset(FORMAT_KEYS["auto"])
TOKEN_COLUMNS = ("token_ids", "completion_token_ids", "completion_ids", "input_ids")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
QUESTION_COLUMNS = ("prompt", "instruction", "question", "query")
CONTEXT_COLUMNS = ("input", "context")  # Alpaca's and Dolly's text that the instruction is about
ANSWER_COLUMNS = ("completion", "response", "output", "answer", "answers")
TOOL_COLUMNS = ("tools", "functions")  # the second is OpenAI's older name
MARKED_TURN = re.compile(r"### (Human|Assistant):")  # Guanaco's: the whole conversation is one text
SWITCHES: dict[str, tuple[type, ...]] = {  # arguments of chat templates that rows name directly, and their types
    "enable_thinking": (bool,), "reasoning_effort": (bool, str), "thinking": (bool, str),
}  # fmt: skip
ROW_MARKS = ("weight", "train")  # 0 or false: no answer of the row is trained; other values are the row's own
BESIDE_TURNS = frozenset(  # columns that change what the model sees, beside those that hold the turns
    (*SYSTEM_COLUMNS, *REASONING_KEYS, *SWITCHES, *TOOL_COLUMNS, *ROW_MARKS, "chat_template_kwargs", "image", "images")
)
MAPPABLE = (
    *FORMAT_KEYS["auto"], "system", "prompt", "instruction", "input", "history", "completion", "output", "tools",
    "chat_template_kwargs", "reasoning_content", "enable_thinking", "reasoning_effort", "images", "image", "id",
    "finish_reason", "input_ids", "loss_mask", "labels", "attention_mask",
)  # fmt: skip


class ColumnMap:
    """`--columns system=persona`: renames columns of rows, and knows whether they ever turned up."""

    def __init__(self, pairs: Sequence[str] = ()) -> None:
        self._names: dict[str, str] = {}
        for pair in pairs:
            ours, equals, theirs = pair.partition("=")
            if not equals or not theirs or ours not in MAPPABLE:
                raise UserError(
                    f"--columns {pair}: needed is OURS=YOURS{nearest(ours, MAPPABLE)}. OURS is one of "
                    f"{', '.join(MAPPABLE)}; for example system=persona."
                )
            self._names[ours] = theirs
        self.unseen = set(self._names.values())

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns under our names; a column that is mapped wins over one of the same name."""
        if not self._names:
            return row
        self.unseen -= row.keys()
        found = {ours: row[theirs] for ours, theirs in self._names.items() if theirs in row}
        moved = set(self._names.values())
        return {name: value for name, value in row.items() if name not in moved} | found

    def check(self, source: str) -> None:
        """Stop when a column was named that no row has."""
        if self.unseen:
            raise UserError(f"{source}: no row has the column {', '.join(sorted(self.unseen))} that --columns names.")


def turns_of(row: Mapping[str, Any], data_format: str) -> tuple[list[Any], set[str]]:
    """The turns of a row, and the columns they came from. Raises Reject for a row of no known shape."""
    keys = FORMAT_KEYS[data_format]
    found = {key: turns for key in keys if key in row and (turns := _list_of(row[key], key)) is not None}
    if found:
        key, turns = next(iter(found.items()))
        for other, others in found.items():
            if not _same_turns(turns, others):
                raise Reject(
                    "two conversations",
                    f"columns {key!r} and {other!r} differ: choose one with --data-format, or remove the other",
                )
        if key == "data" and all(isinstance(turn, str) for turn in turns):  # UltraChat's original form
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        unread = (row.keys() & TURN_COLUMNS) - found.keys()
        return turns, {*found, *(name for name in unread if _list_of(row[name], name) is not None)}
    if data_format == "auto" and (question := _first(row, QUESTION_COLUMNS)):
        return _of_question(row, question)
    if data_format == "auto" and isinstance(text := row.get("text"), str) and MARKED_TURN.match(text.lstrip()):
        return _of_marked_text(text), {"text"}
    if any(row.get(name) is not None for name in TOKEN_COLUMNS):
        return [], set()
    wanted = " or ".join(repr(key) for key in FORMAT_KEYS[data_format])
    more = ", or prompt and completion" if data_format == "auto" else ""
    raise Reject(
        "unknown format", f"a row needs a list named {wanted}{more}, found keys {sorted(map(str, row))}; "
        f"columns of other names are given with --columns"
    )  # fmt: skip


def system_of(row: Mapping[str, Any], messages: Sequence[dict[str, Any]]) -> tuple[str, set[str]]:
    """The system text of a column, where the messages have none; a different one in both is a Reject."""
    names = {name for name in SYSTEM_COLUMNS if isinstance(row.get(name), str)}
    text = one_text([row[name] for name in SYSTEM_COLUMNS if name in names and row[name].strip()], "the system text")
    if not text or not messages or messages[0]["role"] != "system":
        return text, names
    one_text([text.strip(), str(messages[0]["content"]).strip()], "the system text (a column and the first message)")
    return "", names


def tools_in(row: Mapping[str, Any], messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of a row. None when its system message states them already (Hermes): they would be there twice."""
    places = {f"column {name!r}": row.get(name) for name in TOOL_COLUMNS}
    places["the system message"] = messages[0].get("tools") if messages and messages[0]["role"] == "system" else None
    stated = {place: tools_of(value) for place, value in places.items() if value is not None}
    tools = next(iter(stated.values()), [])
    if differs := next((place for place, found in stated.items() if found != tools), None):
        raise Reject("fields contradict", f"tools of {differs} are not those of {next(iter(stated))}: keep one of them")
    system = str(messages[0]["content"]) if messages and messages[0]["role"] == "system" else ""
    written = "<tools>" in system and all(_tool_name(tool) in system for tool in tools)
    return [] if written else tools


def template_kwargs_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The arguments for the chat template: the column of that name, and switches in columns of their own."""
    kwargs = decoded(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise Reject("unknown format", f"chat_template_kwargs is an object, found {type(kwargs).__name__}")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    for name, types in SWITCHES.items():
        for value in (row.get(name), kwargs.get(name)):
            if not isinstance(value, (*types, NoneType)):
                wanted = " or ".join({bool: "true or false", str: "a text"}[one] for one in types)
                raise Reject("unknown format", f"{name} is {wanted}, found {value!r:.60}")
    switches = {name for name in SWITCHES if isinstance(row.get(name), bool)}
    switches |= {"reasoning_effort"} if isinstance(row.get("reasoning_effort"), str) else set()
    if "chat_template_kwargs" in row and row["chat_template_kwargs"]:
        switches.discard("thinking")  # `fledge regenerate` notes there what its arguments say in the template's words
    return {**{name: row[name] for name in SWITCHES if name in switches}, **kwargs}, switches


def row_reasoning(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """Messages with the reasoning of a column, which must belong to the one answer of the row."""
    if wrong := next((name for name in REASONING_KEYS if isinstance(row.get(name), (list, tuple, dict))), None):
        raise Reject("unknown format", f"column {wrong!r} holds reasoning, which is a text; found {row[wrong]!r:.60}")
    names = {name for name in REASONING_KEYS if isinstance(row.get(name), str) and row[name].strip()}
    if not names:
        return messages, names
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) != 1:
        where = f"column {min(names)!r} stands beside {len(answers)} answers"
        raise Reject("reasoning of which answer", f"{where}: put it into the message that it belongs to")
    answer = messages[answers[0]]
    texts = [row[name] for name in sorted(names)] + [answer[key] for key in ("reasoning_content",) if key in answer]
    found = list(messages)
    found[answers[0]] = {**answer, "reasoning_content": one_text(texts, "reasoning")}
    return found, names


def _list_of(value: Any, name: str) -> list[Any] | None:
    """A list of turns; one that was saved as text is decoded."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded(value, name)
    return list(value) if isinstance(value, (list, tuple)) else None


def _of_question(row: Mapping[str, Any], question: str) -> tuple[list[Any], set[str]]:
    """A row of a prompt, what it is about, earlier turns, and its answer if there is one."""
    answer = _first(row, ANSWER_COLUMNS)
    history = row.get("history")
    if question != "instruction" and not _are_pairs(history):
        history = None  # a column of the row's own
    used = {question, *({answer} if answer else ()), *({"history"} if history else ())}
    turns: list[Any] = []
    if history and not isinstance(history, (list, tuple)):
        raise Reject("unknown format", f"history is a list, found {type(history).__name__}")
    for pair in history or ():
        if not _are_pairs([pair]):
            raise Reject("unknown format", "history is a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = _list_of(row[question], question)
    if asked is None:
        context = _first(row, CONTEXT_COLUMNS) if question == "instruction" else None
        used |= {context} if context else set()
        texts = [row[question], *([row[context]] if context else [])]
        asked = [{"role": "user", "content": "\n\n".join(map(str, texts))}]
    turns += asked
    if answer is None:
        return turns, used
    said = _list_of(row[answer], answer)
    if said is None:
        turns.append({"role": "assistant", "content": row[answer]})
    elif answer == "answers":  # xLAM: the calls themselves
        turns.append({"role": "assistant", "content": "", "tool_calls": tool_calls_of(said, len(turns))})
    else:
        turns += said[len(asked) :] if _same_turns(said[: len(asked)], asked) else said
    return turns, used


def _are_pairs(value: Any) -> bool:
    """Whether this is a list of [question, answer]."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in value)


def _of_marked_text(text: str) -> list[dict[str, str]]:
    """The turns of `### Human: Hi### Assistant: Hello`."""
    _, *pieces = MARKED_TURN.split(text)
    return [{"role": role, "content": said.strip()} for role, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that holds a text or a list."""
    return next((name for name in names if isinstance(row.get(name), (str, list, tuple)) and row[name]), None)


def _same_turns(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two lists say the same, whatever names their roles and texts have."""
    return first is second or list(map(_text, first)) == list(map(_text, second))


def _text(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    return next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))
