"""Conversation rows in every container, as training data is read.

A bad row costs one row, named by file and line, wherever the container allows it; a damaged container is an error. The
other rows must come out as they were written.
"""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge.data.conversations import read_conversations
from fledge.data.rejects import Reject, Rejects
from fuzz.documents import DEEP
from fuzz.harness import Case, WrongValue

AREA = "conversation rows"
Row = dict[str, Any]
TREE_MESSAGE = {"message_id": "m", "role": "assistant", "text": "x"}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
TEXT_KEYS = {"conversations": ("from", "value", "human", "gpt"), "messages": ("role", "content", "user", "assistant")}


@st.composite
def good_row(draw: st.DrawFn, key: str, number: int) -> Row:
    """A conversation of one to three turns, maybe with a system message."""
    role, content, user, assistant = TEXT_KEYS[key]
    turns = [{role: "system", content: draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{role: user, content: draw(TEXT)}, {role: assistant, content: draw(TEXT)}]
    return {"id": f"row-{number}", key: turns}


def last(row: Row) -> Row:
    """The last message (an answer); `key_of` names its list."""
    return row[key_of(row)][-1]


def key_of(row: Row) -> str:
    return next(key for key in TEXT_KEYS if key in row)


def with_last(**changes: Any) -> Callable[[Row], Row]:
    """A rule that changes the last message; `role` and `content` mean what this format calls them."""

    def rule(row: Row) -> Row:
        role, content, *_ = TEXT_KEYS[key_of(row)]
        names = {"role": role, "content": content}
        return {**row, key_of(row): [*row[key_of(row)][:-1],
                {**last(row), **{names.get(name, name): value for name, value in changes.items()}}]}  # fmt: skip

    return rule


def with_turns(change: Callable[[list[Row]], Any]) -> Callable[[Row], Row]:
    return lambda row: {**row, key_of(row): change(row[key_of(row)])}


BAD_ROWS: dict[str, Callable[[Row], Any]] = {
    "a list": lambda row: [row],
    "a string": lambda row: "text",
    "a number": lambda row: 5,
    "null": lambda row: None,
    "no messages in it": lambda row: {"id": row["id"], "text": "x"},
    "messages are text": with_turns(lambda turns: "text"),
    "messages are an object": with_turns(lambda turns: {"0": turns[0]}),
    "messages are a number": with_turns(lambda turns: 5),
    "no message": with_turns(lambda turns: []),
    "a message is text": with_turns(lambda turns: [*turns[:-1], "text"]),
    "a message is null": with_turns(lambda turns: [*turns[:-1], None]),
    "a message is a list": with_turns(lambda turns: [*turns[:-1], ["x"]]),
    "unknown role": with_last(role="wizard"),
    "role is a number": with_last(role=5),
    "role is a list": with_last(role=["user"]),
    "role is null": with_last(role=None),
    "content is a number": with_last(content=5),
    "content is true": with_last(content=True),
    "content is an object": with_last(content={"text": "x"}),
    "content is null": with_last(content=None),
    "content is empty": with_last(content=""),
    "content is blank": with_last(content=" \n\t"),
    "content is NaN": with_last(content=float("nan")),
    "a lone surrogate": with_last(content="a\ud800b"),
    "a part is a number": with_last(content=[5]),
    "a part without a type": with_last(content=[{"text": "x"}]),
    "type of a part is a list": with_last(content=[{"type": ["text"], "text": "x"}]),
    "text of a part is a number": with_last(content=[{"type": "text", "text": 5}]),
    "text of a part is a list": with_last(content=[{"type": "text", "text": ["x"]}]),
    "tool calls are a number": with_last(content=None, tool_calls=5),
    "an answer first": with_turns(lambda turns: [turns[-1], *turns[-2:]]),
    "a system message at the end": with_turns(lambda turns: [*turns, {"role": "system", "content": "x"}]),
    "a message of a tree that is not there": lambda row: {**TREE_MESSAGE, "parent_id": "gone"},
    "a message of a tree without a role": lambda row: {**TREE_MESSAGE, "role": None},
    "a tree with a text for a reply": lambda row: {"prompt": {"role": "prompter", "text": "x", "replies": ["x"]}},
    "a tree with a number for replies": lambda row: {"prompt": {"role": "prompter", "text": "x", "replies": 5}},
    "a marked text without a question": lambda row: {"text": "### Assistant: x"},
    "a marked text without words": lambda row: {"text": "### Human:### Assistant:"},
    "id of another row": lambda row: {**row, "id": "row-0"},
    "id with a lone surrogate": lambda row: {**row, "id": "\udfff"},
}

BAD_LINES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[: len(line) // 2],
    "text behind it": lambda line: line + b" x",
    "two objects": lambda line: line + b" " + line.replace(b"row-", b"other-"),
    "not UTF-8": lambda line: line.replace(b'"row-', b'"\xffrow-'),
    "NUL bytes": lambda line: b"\0" * len(line),
    "control character": lambda line: line.replace(b'"row-', b'"\x01row-'),
    "nested without end": lambda line: b"[" * DEEP,
    "nested too deeply": lambda line: line[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a number of 5000 digits": lambda line: line[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    "single quotes": lambda line: line.replace(b'"', b"'"),
    "comma missing": lambda line: line.replace(b', "', b' "', 1),
}

BAD_ARRAYS: dict[str, Callable[[bytes], bytes]] = {
    "text behind the array": lambda text: text + b" x",
    "second array behind it": lambda text: text + text.replace(b"row-", b"other-"),
    "bracket missing at the end": lambda text: text[:-1],
    "comma missing": lambda text: text.replace(b"}, {", b"} {", 1),
    "comma twice": lambda text: text.replace(b"}, {", b"},, {", 1),
    "comma first": lambda text: b"[," + text[1:],
    "comma last": lambda text: text[:-1] + b",]",
    "cut": lambda text: text[: len(text) * 2 // 3],
    "not UTF-8": lambda text: text.replace(b'"row-', b'"\xffrow-', 1),
    "NUL bytes": lambda text: text + b"\0\0",
    "nested without end": lambda text: text[:-1] + b", " + b"[" * DEEP,
    "nested too deeply": lambda text: text[:-1] + b", " + b"[" * DEEP + b"]" * DEEP + b"]",
}

BAD_GZIP: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "its last bytes missing": lambda content: content[:-4],
    "not compressed": gzip.decompress,
    "checksum wrong": lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
    "a flipped bit": lambda content: content[:-12] + bytes([content[-12] ^ 16]) + content[-11:],
    "empty": lambda content: b"",
    "text behind it": lambda content: content + b"text",
}


def footer(content: bytes) -> int:
    """Where the footer of a parquet file begins."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


BAD_PARQUET: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "its last bytes missing": lambda content: content[:-5],
    "empty": lambda content: b"",
    "only the mark": lambda content: b"PAR1",
    "zeros in its data": lambda content: content[:4] + bytes(len(content) // 3) + content[4 + len(content) // 3 :],
    "its footer damaged": lambda content: content[: footer(content)] + bytes(20) + content[footer(content) + 20 :],
    "JSON lines": lambda content: b'{"a": 1}\n',
}

CONTAINERS = (".jsonl", ".ndjson", ".jsonl.gz", ".json", ".parquet")


def packed(rows: list[Any], container: str) -> bytes:
    """Rows as the content of a file."""
    if container == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if container == ".json":
        return json.dumps(rows).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines, mtime=0) if container == ".jsonl.gz" else lines


def read_all(path: Path, expected: list[Row]) -> None:
    """Every expected row must come out as written; a row that is rejected raises its Reject."""
    rejects = Rejects(max_share=1.0)
    found = list(read_conversations(str(path), rejects=rejects))
    said = {conversation.id: [m["content"] for m in conversation.messages] for conversation in found}
    for row in expected:
        texts = [turn[TEXT_KEYS[key_of(row)][1]] for turn in row[key_of(row)]]
        if said.get(row["id"]) != texts:
            raise WrongValue(f"row {row['id']!r} says {said.get(row['id'])!r}, not {texts!r}")
    if rejects.counts:
        reason = next(iter(rejects.counts))
        raise Reject(reason, rejects.first[reason])
    if len(found) != len(expected):
        raise WrongValue(f"{len(found)} conversations of {len(expected)}")


def case(rule: str | None, container: str, content: bytes, expected: list[Row]) -> Case:
    def act(folder: Path) -> None:
        path = folder / f"data{container}"
        path.write_bytes(content)
        read_all(path, expected)

    return Case(AREA, rule and f"{container}: {rule}", act, shown=f"data{container}: {content[-200:]!r}")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two good rows and a third that is good or broken, in a container that is whole or damaged."""
    key = draw(st.sampled_from(list(TEXT_KEYS)))
    rows = [draw(good_row(key, number)) for number in range(3)]
    container = draw(st.sampled_from(CONTAINERS))
    kind = draw(st.sampled_from(["valid", "row", "row", "container", "container"]))
    if kind == "valid":
        return case(None, container, packed(rows, container), rows)
    if kind == "row" and container != ".parquet":  # a column of parquet has one type
        name = draw(st.sampled_from(list(BAD_ROWS)))
        return case(f"row is {name}", container, packed([*rows[:2], BAD_ROWS[name](rows[2])], container), rows[:2])
    content = packed(rows, container)
    if container in (".jsonl", ".ndjson"):
        name = draw(st.sampled_from(list(BAD_LINES)))
        lines = content.splitlines()
        lines.insert(draw(st.integers(0, 2)), BAD_LINES[name](packed([{**rows[0], "id": "row-x"}], container).strip()))
        return case(f"line: {name}", container, b"\n".join(lines), rows)
    damage = {".json": BAD_ARRAYS, ".jsonl.gz": BAD_GZIP, ".parquet": BAD_PARQUET}[container]
    name = draw(st.sampled_from(list(damage)))
    return case(name, container, damage[name](content), [])
