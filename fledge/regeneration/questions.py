"""What a conversation asks: its user turns, and the tool results that the data holds for each.

Knows messages. Does not know how they are answered. The data's own answers are dropped; its tool results are kept,
because no tool can be called here. A result belongs to its call: it is used again where the target makes the same call,
that is, the same function with equal arguments (compared as JSON, in any order of calls and of keys).
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject

Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """Calls of one assistant message of the data, and the tool messages that answer them."""

    calls: list[Message]
    results: list[Message] = field(default_factory=list)

    def results_for(self, calls: list[Message]) -> list[Message] | None:
        """The data's results for these calls, in their order; None when a call is another one or has no result."""
        known = [(_signature(call), result) for call, result in self._pairs()]
        found: list[Message] = []
        for call in calls:
            place = next((i for i, (signature, _) in enumerate(known) if signature == _signature(call)), None)
            if place is None:
                return None
            result = dict(known.pop(place)[1])
            result.pop("tool_call_id", None)
            found.append(result | ({"tool_call_id": call["id"]} if call.get("id") else {}))
        return None if known else found

    def _pairs(self) -> list[tuple[Message, Message]]:
        """Each call with its result: by id where the data names ids, else by place."""
        by_id = {result["tool_call_id"]: result for result in self.results if result.get("tool_call_id")}
        if by_id and all(call.get("id") in by_id for call in self.calls):
            return [(call, by_id[call["id"]]) for call in self.calls]
        return list(zip(self.calls, self.results, strict=False)) if len(self.calls) == len(self.results) else []


@dataclass(frozen=True)
class Turn:
    """What is said before an answer (a system message, if any, and the question) and the data's tool exchanges."""

    asked: list[Message]
    exchanges: list[Exchange] = field(default_factory=list)


def turns_of(conversation: Conversation, system_prompt: str | None) -> list[Turn]:
    """The turns of a conversation in order; `system_prompt` opens the first when the data has no system message."""
    messages = [dict(message) for message in conversation.messages]
    if system_prompt and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    turns: list[Turn] = []
    before: list[Message] = []  # system messages that wait for their question
    for message in messages:
        role, calls = message["role"], message.get("tool_calls")
        if role == "user":
            turns.append(Turn([*before, message]))
            before = []
        elif role == "system":
            before.append(message)
        elif calls and turns:
            turns[-1].exchanges.append(Exchange(list(calls)))
        elif role == "tool":
            if not turns or not turns[-1].exchanges:
                raise Reject("tool calls", "it has a tool result without a call before it")
            turns[-1].exchanges[-1].results.append(message)
    if not turns:
        raise Reject("no question", "it has no user turn")
    return turns


def prompt_digest(conversation: Conversation) -> bytes:
    """What a conversation asks, as 20 bytes: system message, user turns, tool results, what the template is told."""
    asked: list[Any] = [
        (m["role"], m["content"]) for m in conversation.messages if m["role"] in ("system", "user", "tool")
    ]
    asked += [
        [name, conversation.meta[name]] for name in ("tools", "chat_template_kwargs") if conversation.meta.get(name)
    ]
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=20).digest()


def _signature(call: Message) -> str:
    """The function a call names and its arguments, as one text."""
    function = call.get("function") or call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    return json.dumps([function.get("name"), arguments], sort_keys=True)
