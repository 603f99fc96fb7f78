"""Trees of messages become conversations: every path, every answer supervised once, one side of the split a tree."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from fledge.data.conversations import read_conversations
from fledge.data.dataset import TokenizedData
from fledge.data.rejects import Rejects
from fledge.data.samples import conversation_id
from fledge.data.tokenize import ChatTemplate

LABELS = {"spam": {"value": 0.0, "count": 3}}


def message(id: str, parent: str | None, text: str, rank: int | None = None) -> dict:
    """A row of oasst1 as the hub has it."""
    role = "prompter" if text.endswith("?") else "assistant"
    return {
        "message_id": id, "parent_id": parent, "user_id": "u", "text": text, "role": role, "lang": "en", "rank": rank,
        "message_tree_id": "r", "tree_state": "ready_for_export", "labels": LABELS, "deleted": False,
    }  # fmt: skip


#   1? ─┬─ A (rank 1) ─── 2? ─┬─ C
#       │                     └─ D
#       └─ B (rank 0)
MESSAGES = [
    message("r", None, "1?"), message("a", "r", "A", 1), message("b", "r", "B", 0), message("q", "a", "2?"),
    message("c", "q", "C", 0), message("d", "q", "D", 1),
]  # fmt: skip
PATHS = {"r": "1? B", "r#answer2": "1? A 2? C", "r#answer3": "1? (A) 2? D"}


def nested(id: str) -> dict:
    (found,) = (dict(one) for one in MESSAGES if one["message_id"] == id)
    return {**found, "replies": [nested(one["message_id"]) for one in MESSAGES if one["parent_id"] == id]}


TREE = {"message_tree_id": "r", "tree_state": "ready_for_export", "prompt": nested("r")}


def read(path, max_share=0.0):
    rejects = Rejects(max_share=max_share)
    return list(read_conversations(str(path), rejects=rejects)), rejects


def said(conversations) -> dict[str, str]:
    """The texts of each conversation; answers that are not trained in brackets."""
    return {
        c.id: " ".join(f"({m['content']})" if m.get("train") is False else m["content"] for m in c.messages)
        for c in conversations
    }


def test_messages_of_a_tree_in_any_order(write_rows):
    """A row of one message was an `unknown format`: OASST could not be read at all."""
    shuffled = list(MESSAGES)
    random.Random(0).shuffle(shuffled)
    for rows in (MESSAGES, shuffled):
        found, rejects = read(write_rows(rows))
        assert said(found) == PATHS and rejects.seen == len(PATHS)
    assert found[0].meta == {"id": "r", "message_tree_id": "r", "message_id": "b", "lang": "en"}


def test_the_hubs_parquet_leaves_the_roots_parent_empty(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MESSAGES), tmp_path / "train.parquet")
    assert said(read(tmp_path / "train.parquet")[0]) == PATHS


def test_trees_with_their_replies_inside(tmp_path):
    with gzip.open(tmp_path / "ready.trees.jsonl.gz", "wt") as file:
        file.write(json.dumps(TREE) + "\n")
    found, _ = read(tmp_path / "ready.trees.jsonl.gz")
    assert said(found) == PATHS and found[0].where.endswith("ready.trees.jsonl.gz:1")


def test_other_rows_stay_what_they_are(write_rows):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}, *MESSAGES]
    assert list(said(read(write_rows(rows))[0]).values()) == ["Hi x", *PATHS.values()]


def test_every_answer_is_supervised_once_and_a_tree_has_one_side(write_rows, make_tokenizer, tmp_path):
    template = ChatTemplate(make_tokenizer(("<|im_start|>", "<|im_end|>")), "chatml")
    data = TokenizedData.from_path(str(write_rows(MESSAGES)), template, cache_dir=tmp_path)
    written = "".join(template.tokenizer.decode(sample.input_ids[sample.loss_mask]) for sample in data)
    assert sorted(written.split("<|im_end|>")) == ["", "A", "B", "C", "D"]
    assert {conversation_id(id) for id in data.ids} == {"r"}


@pytest.mark.parametrize(
    ("rows", "detail"),
    [
        (MESSAGES[1:2], "parent_id 'r' leads to no first message"),
        ([message("x", "y", "A"), message("y", "x", "1?")], "leads to no first message"),
        ([MESSAGES[0]], "message_id 'r' was already used at"),
        ([{**message("x", "r", "A"), "text": 3}], "content of type int"),
        ([{**message("x", "r", "A"), "role": "wizard"}], "role 'wizard'"),
        ([message("x", "r", "3?")], None),  # a question to a question is one: they are joined
        ([message("x", "a", "E")], "assistant after assistant"),
    ],
)  # fmt: skip
def test_what_is_no_tree_is_named(write_rows, rows, detail):
    """The negative control is the row that belongs there: nothing is rejected for it."""
    found, rejects = read(write_rows([*MESSAGES, *rows] if rows != MESSAGES[1:2] else rows + [TREE]), max_share=0.9)
    assert found and bool(rejects.first) == (detail is not None)
    assert detail is None or any(detail in first for first in rejects.first.values())


def test_a_long_chain_needs_no_recursion(write_rows):
    rows = [message("0", None, "0?")]
    rows += [message(str(i), str(i - 1), f"{i}" if i % 2 else f"{i}?") for i in range(1, 5000)]
    (found,), _ = read(write_rows(rows))
    assert len(found.messages) == 5000
