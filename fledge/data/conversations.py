"""Rows of public chat formats, as validated conversations.

Knows ShareGPT (`conversations`: from/value), UltraChat (`messages`, or `data`: a list of strings) and OpenAI messages
(content as text or as parts; pictures in the parts, or in the row beside them). Knows no tokenizer. A conversation that
leaves here has roles in an order every chat template understands: an optional system message, then user and assistant
in turn (tool results count as user turns). Rows that already hold token ids pass through with empty `messages` allowed;
`tokenize.py` reads the ids from `meta`.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fledge.data.images import with_row_images
from fledge.data.rejects import Reject, Rejects
from fledge.data.rows import Row, read_rows
from fledge.errors import UserError

DataFormat = Literal["auto", "sharegpt", "ultrachat", "messages"]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
ID_KEYS = ("id", "conversation_id", "prompt_id", "uid")
FORMAT_KEYS = {
    "auto": ("conversations", "conversation", "messages", "data"),
    "sharegpt": ("conversations", "conversation"),
    "ultrachat": ("messages", "data"),
    "messages": ("messages",),
}
TOKEN_KEYS = ("token_ids", "completion_token_ids", "completion_ids", "input_ids")
HOPELESS_ROWS = 200  # this many rows and not one good: stop at once instead of reading a million more


@dataclass(frozen=True)
class Conversation:
    """One conversation, roles in a valid order. `meta` is the rest of its row; `where` its file and line."""

    id: str
    messages: tuple[dict[str, Any], ...]
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def num_answers(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)


def read_conversations(
    path_or_name: str, *, data_format: DataFormat = "auto", rejects: Rejects, split: str = "train"
) -> Iterator[Conversation]:
    """Stream the conversations of a file, a folder or a hub data set; bad rows go to `rejects`.

    Ends with `rejects.check()`. Conversations without an answer (prompts to regenerate) are good ones here.
    """
    if data_format not in FORMAT_KEYS:
        raise UserError(f"data format {data_format!r} is unknown: use one of {', '.join(FORMAT_KEYS)}.")
    seen_ids = _SeenIds()
    good = 0
    for row in read_rows(path_or_name, split):
        rejects.seen += 1
        try:
            conversation = parse_row(row, data_format)
            seen_ids.claim(conversation.id, row.where)
        except Reject as reject:
            rejects.add(_row_id(row), reject.reason, reject.detail, row.where)
            if not good and rejects.num_rejected >= HOPELESS_ROWS:
                rejects.check()
            continue
        good += 1
        yield conversation
    rejects.check()
    if not good:
        raise UserError(
            f"{path_or_name}: no conversations ({rejects.seen} rows read). Give a file with at least one row."
        )


def parse_row(row: Row, data_format: DataFormat = "auto") -> Conversation:
    """One row to a validated conversation; raises Reject."""
    if row.value is None:
        raise Reject("broken row", row.error or "unreadable")
    key = next((key for key in FORMAT_KEYS[data_format] if isinstance(row.value.get(key), (list, tuple))), None)
    has_tokens = any(row.value.get(name) is not None for name in TOKEN_KEYS)
    if key is None and not has_tokens:
        wanted = " or ".join(repr(key) for key in FORMAT_KEYS[data_format])
        raise Reject("unknown format", f"a row needs a list named {wanted}, found keys {sorted(map(str, row.value))}")
    turns = row.value[key] if key else []
    messages = tuple(with_row_images([_message(turn, index, key) for index, turn in enumerate(turns)], row.value))
    if messages or not has_tokens:
        check_roles(messages)
    meta = {name: value for name, value in row.value.items() if name != key and value is not None}
    return Conversation(_row_id(row), messages, meta, row.where)


def check_roles(messages: tuple[dict[str, Any], ...]) -> None:
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


def _message(turn: Any, index: int, key: str | None) -> dict[str, Any]:
    if isinstance(turn, str) and key == "data":  # UltraChat's original form: user and assistant in turn
        turn = {"role": "user" if index % 2 == 0 else "assistant", "content": turn}
    if not isinstance(turn, dict):
        raise Reject(
            "unknown format", f"message {index} is {type(turn).__name__}, expected an object with role and content"
        )
    name = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Reject("unknown role", f"message {index} has role {name!r}, known are {', '.join(ROLES)}")
    content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    extras = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value", "text") and v is not None}
    return {"role": role, "content": _content(content, role, index, extras), **extras}


def _content(content: Any, role: str, index: int, extras: dict[str, Any]) -> str | list[dict[str, Any]]:
    """The text of a message; lists of parts stay lists only when a part is not text."""
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if not all(isinstance(part, dict) and "type" in part for part in parts):
            raise Reject("unknown format", f"message {index} has content parts that are not objects with a type")
        if any(part["type"] != "text" for part in parts):
            return parts
        content = "".join(str(part.get("text") or "") for part in parts)
    if content is None and extras.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise Reject("unknown format", f"message {index} ({role}) has content of type {type(content).__name__}")
    if not content.strip() and role in ("assistant", "user") and not extras.get("tool_calls"):
        kind = "empty answer" if role == "assistant" else "empty message"
        raise Reject(kind, f"message {index} ({role}) is empty")
    return content


def _row_id(row: Row) -> str:
    for key in ID_KEYS:
        value = (row.value or {}).get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
            return str(value)
    return row.key


class _SeenIds:
    """Ids key the shards, the resume and the split: a second row of the same id is rejected, naming both.

    Holds a 64-bit digest and a packed place per row (about 0.1 GB per million rows), not the ids.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._files: list[str] = []

    def claim(self, id: str, where: str) -> None:
        key = int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        number = re.search(r"\d*$", where).group()  # type: ignore[union-attr]  # always matches
        file = where.removesuffix(number)
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        if key in self._places:
            file_index, first = divmod(self._places[key], 1 << 40)
            place = f"{self._files[file_index]}{first}"
            raise Reject("duplicate id", f"id {id!r} was already used at {place}; give every row an id of its own")
        self._places[key] = (len(self._files) - 1 << 40) + int(number or 0)
