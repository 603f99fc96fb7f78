"""Trees of messages (OASST), as one conversation for every path from the root to a leaf.

A file holds a message per row (`message_id`, `parent_id`) or a tree per row (`prompt` with nested `replies`):

    prompt ─┬─ answer a ─── prompt ─── answer c      path 1: prompt, answer a, prompt, answer c
            └─ answer b                              path 2: prompt, answer b

Paths share their beginnings, so an answer that an earlier path holds is context in later ones (`train: False`): every
answer is supervised once. Paths are `TREE#answer1`, `TREE#answer2`, ..., which one side of the evaluation split gets;
the better ranked replies come first. Rows of single messages may come in any order, so all of them are held until the
last one was read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fledge.data.rows import ANSWER_MARK, Row

MESSAGE = frozenset(("message_id", "role", "text"))  # columns that a row of one message has
KEPT = ("message_tree_id", "message_id", "lang")  # columns of a leaf that stay with its path
READ = (*MESSAGE, "parent_id", "rank", *KEPT)


@dataclass(eq=False)
class Node:
    """One message of a tree and the replies to it."""

    where: str
    value: dict[str, Any]
    replies: list["Node"] = field(default_factory=list)
    told: bool = False  # an earlier path holds this message

    @property
    def rank(self) -> float:
        """0 for the best of several replies; those without a rank come last."""
        rank = self.value.get("rank")
        return rank if isinstance(rank, (int, float)) and not isinstance(rank, bool) else float("inf")


def paths_of_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with trees of messages replaced by their paths; those of single messages come after all others."""
    messages: list[Node] = []
    for row in rows:
        if row.value is None:
            yield row
        elif row.value.keys() >= MESSAGE:
            messages.append(Node(row.where, {name: row.value[name] for name in READ if name in row.value}))
        elif isinstance(prompt := row.value.get("prompt"), dict) and "text" in prompt:
            yield from _paths(_nested(row, prompt), str(row.value.get("message_tree_id") or row.key))
        else:
            yield row
    yield from _paths_of_messages(messages)


def _nested(row: Row, prompt: dict[str, Any]) -> Node:
    root = Node(row.where, prompt)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        replies = node.value.get("replies") or []
        node.replies = [
            Node(row.where, reply if isinstance(reply, dict) else {})  # without a role: its path is rejected
            for reply in (replies if isinstance(replies, list) else [replies])
        ]
        waiting += node.replies
    return root


def _paths_of_messages(messages: list[Node]) -> Iterator[Row]:
    """Paths of messages that name their parents. What hangs on no root is a broken row: its tree is not whole."""
    nodes: dict[str, Node] = {}
    for node in messages:
        id = str(node.value["message_id"])
        if id in nodes:
            yield Row(node.where, id, None, f"message_id {id!r} was already used at {nodes[id].where}")
        else:
            nodes[id] = node
    roots = []
    for node in nodes.values():
        parent = node.value.get("parent_id")
        if parent is None:  # tables leave such a column out
            roots.append(node)
        elif str(parent) in nodes:
            nodes[str(parent)].replies.append(node)
    for root in roots:
        yield from _paths(root, str(root.value["message_id"]))
    for id, node in nodes.items():
        if not node.told:
            parent = node.value["parent_id"]
            yield Row(node.where, id, None, f"parent_id {parent!r} leads to no first message: its tree is not whole")


def _paths(root: Node, id: str) -> Iterator[Row]:
    """A row for every leaf below `root`, depth first."""
    number = 0
    path: list[Node] = []
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        del path[depth:]
        path.append(node)
        waiting += [(reply, depth + 1) for reply in sorted(node.replies, key=lambda reply: reply.rank, reverse=True)]
        if node.replies:
            continue
        number += 1
        value = {name: node.value[name] for name in KEPT if node.value.get(name) is not None}
        messages = [_message(one) for one in path]
        key = id if number == 1 else f"{id}{ANSWER_MARK}{number}"
        yield Row(node.where, key, {**value, "id": key, "messages": messages})


def _message(node: Node) -> dict[str, Any]:
    """A message as rows of conversations have it, marked when an earlier path holds it."""
    message = {name: node.value.get(name) for name in ("role", "text")}
    if node.told:
        message["train"] = False
    node.told = True
    return message
