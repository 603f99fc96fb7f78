"""Rows of public chat formats, as validated conversations.

Knows rows, not tokenizers. `columns.py` finds the conversation in a row, `messages.py` brings its turns into one form.
A conversation that leaves here has roles in an order every chat template understands: an optional system message, then
user and assistant in turn (tool results count as user turns). Rows that already hold token ids may have no messages;
`samples.py` reads the ids from `meta`.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fledge.data.columns import (
    BESIDE_TURNS,
    FORMAT_KEYS,
    ROW_MARKS,
    TOKEN_COLUMNS,
    TOOL_COLUMNS,
    ColumnMap,
    DataFormat,
    row_reasoning,
    system_of,
    template_kwargs_of,
    tools_in,
    turns_of,
)
from fledge.data.images import with_row_images
from fledge.data.messages import check_roles, joined, message_of
from fledge.data.rejects import Reject, Rejects
from fledge.data.rows import ANSWER_MARK, Row, read_rows
from fledge.data.trees import paths_of_trees
from fledge.errors import UserError

__all__ = [
    "ANSWER_MARK", "Conversation", "DataFormat", "RepeatedIds", "check_roles",
    "parse_row", "read_conversations",
]  # fmt: skip

RepeatedIds = Literal["reject", "answers"]
ID_KEYS = ("id", "conversation_id", "prompt_id", "uid")
HOPELESS_ROWS = 200  # this many rows and not one good: stop at once instead of reading a million more


@dataclass(frozen=True)
class Conversation:
    """One conversation, roles in a valid order. `meta` is the rest of its row; `where` its file and line.

    `meta["tools"]` and `meta["chat_template_kwargs"]` are decoded; `used` names the columns that became messages.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    used: frozenset[str] = frozenset()

    @property
    def num_answers(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def tools(self) -> list[dict[str, Any]]:
        return self.meta.get("tools") or []

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return self.meta.get("chat_template_kwargs") or {}


def read_conversations(
    path_or_name: str, *, data_format: DataFormat = "auto", rejects: Rejects, split: str = "train",
    columns: Sequence[str] = (), repeated_ids: RepeatedIds = "reject",
) -> Iterator[Conversation]:  # fmt: skip
    """Stream the conversations of a file, a folder or a hub data set; bad rows go to `rejects`.

    Ends with `rejects.check()`. Conversations without an answer (prompts to regenerate) are good ones here.
    """
    if data_format not in FORMAT_KEYS:
        raise UserError(f"data format {data_format!r} is unknown: use one of {', '.join(FORMAT_KEYS)}.")
    seen_ids = _SeenIds(repeated_ids)
    names = ColumnMap(columns)
    good = 0
    for row in paths_of_trees(read_rows(path_or_name, split)):
        rejects.seen += 1
        try:
            conversation = seen_ids.claimed(parse_row(row, data_format, names))
        except Reject as reject:
            rejects.add(_row_id(row), reject.reason, reject.detail, row.where)
            if not good and rejects.num_rejected >= HOPELESS_ROWS:
                names.check(path_or_name)
                rejects.check()
            continue
        good += 1
        yield conversation
    if rejects.seen:
        names.check(path_or_name)
    rejects.check()
    if not good:
        raise UserError(
            f"{path_or_name}: no conversations ({rejects.seen} rows read). Give a file with at least one row."
        )


def parse_row(row: Row, data_format: DataFormat = "auto", columns: ColumnMap | None = None) -> Conversation:
    """One row to a validated conversation; raises Reject."""
    if row.value is None:
        raise Reject("broken row", row.error or "unreadable")
    value = columns.renamed(row.value) if columns else row.value
    try:
        return _parsed(row, value, data_format)
    except RecursionError:
        raise Reject("broken row", "its values are nested too deeply") from None


def _parsed(row: Row, value: dict[str, Any], data_format: DataFormat) -> Conversation:
    turns, used = turns_of(value, data_format)
    messages = joined([message_of(turn, index) for index, turn in enumerate(turns)])
    stated: dict[str, Any] = {}
    if not value.keys().isdisjoint(BESIDE_TURNS) or messages and "tools" in messages[0]:
        messages, stated, more = _with_columns(messages, value)
        used |= more
    if messages or all(value.get(name) is None for name in TOKEN_COLUMNS):
        check_roles(messages)
    meta = {name: item for name, item in value.items() if name not in used and item is not None}
    return Conversation(_row_id(row), tuple(messages), meta | stated, row.where, frozenset(used))


def _with_columns(
    messages: list[dict[str, Any]], value: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any], set[str]]:
    """The messages with what columns beside them say, the decoded tools and template arguments, and what was used."""
    kwargs, used = template_kwargs_of(value)
    stated = {"tools": tools_in(value, messages), "chat_template_kwargs": kwargs}
    used |= value.keys() & {*stated, *TOOL_COLUMNS}
    if messages:
        system, columns = system_of(value, messages)
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        messages[0] = {name: item for name, item in messages[0].items() if name != "tools"}
        messages, more = row_reasoning(value, messages)
        used |= columns | more
        if marks := {name for name in ROW_MARKS if value.get(name) is not None and value[name] == 0}:
            messages = [{**one, "train": False} if one["role"] == "assistant" else one for one in messages]
            used |= marks
        with_images = with_row_images(messages, value)
        if with_images is not messages:
            used |= value.keys() & {"image", "images"}
        messages = with_images
    return messages, {name: found for name, found in stated.items() if found}, used


def _row_id(row: Row) -> str:
    for key in ID_KEYS:
        value = (row.value or {}).get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
            return str(value)
    return row.key


class _SeenIds:
    """Ids key the shards, the resume and the split: a second row of the same id is rejected, naming both.

    Where several answers of one prompt are expected, later ones are numbered instead, and only the same answer again is
    rejected. Holds a 64-bit digest and a packed place per row (about 0.1 GB per million rows), not the ids.
    """

    def __init__(self, repeated: RepeatedIds = "reject") -> None:
        self._places: dict[int, int] = {}
        self._files: list[str] = []
        self._repeated = repeated
        self._counts: dict[int, int] = {}

    def claimed(self, conversation: Conversation) -> Conversation:
        """The conversation under an id that is its own."""
        id = conversation.id
        if self._repeated == "answers":
            self._claim(f"{id}\0{conversation.messages!r}\0{_token_ids(conversation)!r}", conversation, "and answer ")
            key = _digest(id)
            number = self._counts[key] = self._counts.get(key, 0) + 1
            return conversation if number == 1 else replace(conversation, id=f"{id}{ANSWER_MARK}{number}")
        self._claim(id, conversation)
        return conversation

    def _claim(self, text: str, conversation: Conversation, what: str = "") -> None:
        key, where = _digest(text), conversation.where
        number = re.search(r"\d*$", where).group()  # type: ignore[union-attr]  # always matches
        file = where.removesuffix(number)
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        if key in self._places:
            file_index, first = divmod(self._places[key], 1 << 40)
            raise Reject(
                "duplicate id",
                f"id {conversation.id!r} {what}was already used at {self._files[file_index]}{first}; give every row an "
                f"id of its own" + ("" if what else ", or say --repeated-ids answers"),
            )
        self._places[key] = (len(self._files) - 1 << 40) + int(number or 0)


def _token_ids(conversation: Conversation) -> list[Any]:
    return [conversation.meta[name] for name in TOKEN_COLUMNS if name in conversation.meta]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
