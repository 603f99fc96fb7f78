"""One message of a row, in the one form that rendering, regeneration and extraction know.

    role               system, user, assistant or tool
    content            text, or parts when one of them is a picture
    reasoning_content  what an assistant thought, whatever the row calls it
    tool_calls         see tool_calls.py; an empty list is left out
    train: False       only on answers that must not be supervised (weight: 0 and the like)

Whatever else a message holds (`name`, `tool_call_id`, own fields) stays beside these; None is the same as absent.
"""

from collections.abc import Sequence
from typing import Any

from fledge.data.image_urls import IMAGE_TYPES
from fledge.data.images import source_of_value
from fledge.data.rejects import Reject
from fledge.data.tool_calls import json_text, tool_calls_of

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT with tools: the value is the JSON text of the call
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text", "think",
)  # fmt: skip
REASONING_PARTS = ("thinking", "reasoning")
TRAIN_KEYS = ("weight", "train", "training", "trainable", "loss")
CALL_KEYS = ("tool_calls", "function_call")
PLAIN_KEYS = frozenset((*ROLE_KEYS, "content", "value"))
KNOWN_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *TRAIN_KEYS, *CALL_KEYS))


def message_of(turn: Any, index: int) -> dict[str, Any]:
    """A turn of a row as a message; raises Reject."""
    if not isinstance(turn, dict):
        raise Reject(
            "unknown format", f"message {index} is {type(turn).__name__}, expected an object with role and content"
        )
    name = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Reject("unknown role", f"message {index} has role {name!r}, known are {', '.join(ROLES)}")
    content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
    is_call = isinstance(name, str) and name.lower() in CALL_ROLES
    if turn.keys() <= PLAIN_KEYS and isinstance(content, str) and not is_call:
        return {"role": role, "content": _not_empty(content, role, index)}  # nearly every message there is
    calls: list[dict[str, Any]] = []
    if is_call:
        calls, content = tool_calls_of(content, index), None
    for key in CALL_KEYS:
        if role == "assistant" and turn.get(key) is not None:
            calls = calls or tool_calls_of(turn[key], index)
    content, thought = _without_reasoning_parts(content) if role == "assistant" else (content, [])
    reasoning = _reasoning(turn, thought, index) if role == "assistant" else ""
    says_more = bool(calls or reasoning)  # an answer cut while the model was reasoning has nothing else
    message: dict[str, Any] = {"role": role, "content": _content(content, role, index, says_more)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and not _is_trained(turn, index):
        message["train"] = False
    known = KNOWN_KEYS if role == "assistant" else KNOWN_KEYS - set(REASONING_KEYS)
    return message | {key: value for key, value in turn.items() if key not in known and value is not None}


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive system or user messages as one, a blank line between them.

    Many templates refuse two in a row (Gemma, Mistral), and all of them take one; the text stays whole either way.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and message["role"] == found[-1]["role"] and message["role"] in ("system", "user"):
            found[-1] = {**found[-1], **message, "content": _together(found[-1]["content"], message["content"])}
        else:
            found.append(message)
    return found


def check_roles(messages: Sequence[dict[str, Any]]) -> None:
    """System (if any) first, then user and assistant in turn, starting with user; tool results answer an assistant."""
    if not messages:
        raise Reject("empty conversation", "it has no messages")
    previous = "system"
    for index, message in enumerate(messages):
        role = message["role"]
        allowed = {
            "system": ("system", "user") if index == 0 else ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant", "user"),
        }[previous]
        if role not in allowed:
            before = f"after {previous}" if index else "at the start"
            raise Reject("roles out of order", f"message {index} is {role} {before}, expected {' or '.join(allowed)}")
        previous = role
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise Reject("empty conversation", "it has a system message only")


def one_text(values: list[str], what: str) -> str:
    """The text that several spellings of a field agree on."""
    if len(set(values)) > 1:
        raise Reject("fields contradict", f"{what} is given twice, with different texts: keep one of them")
    return values[0] if values else ""


def _reasoning(turn: dict[str, Any], parts: list[str], index: int) -> str:
    values = [turn[key] for key in REASONING_KEYS if turn.get(key)]
    if wrong := next((value for value in values if not isinstance(value, str)), None):
        raise Reject("unknown format", f"message {index}: reasoning is a text, found {type(wrong).__name__}")
    if parts:
        values.append("".join(parts))
    return one_text([value for value in values if value.strip()], f"message {index}: reasoning")


def _is_trained(turn: dict[str, Any], index: int) -> bool:
    """What weight, train and their like say about an answer; a weight is 0 or 1."""
    marks = {key: turn[key] for key in TRAIN_KEYS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise Reject("unknown weight", f"message {index} has {key}={mark!r}; an answer is trained (1) or not (0)")
    return all(marks.values())


def _without_reasoning_parts(content: Any) -> tuple[Any, list[str]]:
    """Content parts and, apart from them, the texts of those that hold reasoning."""
    if not isinstance(content, list):
        return content, []
    thoughts, others = [], []
    for part in content:
        if isinstance(part, dict) and part.get("type") in REASONING_PARTS:
            inner = next((part[key] for key in (*REASONING_PARTS, "text") if part.get(key)), "")
            pieces = inner if isinstance(inner, list) else [inner]
            thoughts += [str(piece.get("text") or "") if isinstance(piece, dict) else str(piece) for piece in pieces]
        else:
            others.append(part)
    return others, thoughts


def _content(content: Any, role: str, index: int, says_more: bool) -> str | list[dict[str, Any]]:
    """The text of a message; lists of parts stay lists only when a part is not text."""
    if role == "tool" and _is_result(content):
        return json_text(content)
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts):
            raise Reject("unknown format", f"message {index} has content parts that are not objects with a type")
        if any(part["type"] != "text" for part in parts):
            return [_part(part) for part in parts]
        texts = [part.get("text") for part in parts]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise Reject("unknown format", f"message {index} has a text part whose text is not a string")
        content = "".join(text or "" for text in texts)
    if content is None and says_more:
        content = ""
    if not isinstance(content, str):
        raise Reject("unknown format", f"message {index} ({role}) has content of type {type(content).__name__}")
    return content if says_more else _not_empty(content, role, index)


def _is_result(content: Any) -> bool:
    """Whether a tool's result was decoded already: an object, a number, or a list that is no list of parts."""
    if isinstance(content, list):
        return not all(isinstance(part, str) or isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, (dict, int, float))


def _not_empty(content: str, role: str, index: int) -> str:
    if not content.strip() and role in ("assistant", "user"):
        kind = "empty answer" if role == "assistant" else "empty message"
        raise Reject(kind, f"message {index} ({role}) is empty")
    return content


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message; a picture that is embedded ({"bytes": ...}) as its source."""
    if part["type"] not in IMAGE_TYPES:
        return part
    found = part.get("image", part)
    if isinstance(found, dict) and (found.get("bytes") or found.get("path")):
        return {"type": "image", "image": source_of_value(found)}
    return {key: value for key, value in part.items() if value is not None}


def _together(first: Any, second: Any) -> str | list[dict[str, Any]]:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_as_parts(first), {"type": "text", "text": "\n\n"}, *_as_parts(second)]


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]
