"""Which fields of a conversation left no trace in the text that a chat template made of it.

A template reads what its author thought of: many ignore reasoning, tool calls or tools, some the system message, and
say nothing. The head would then learn from a text that the target never saw. So each field is taken away once and the
conversation is rendered again: when the text stays the same, the field is not in it. Plain conversations, whose
contents stand in the text one behind the other, cost one search per message.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fledge.data.messages import REASONING_KEYS
from fledge.data.rejects import Reject

Untraced = Literal["reject", "train"]
UNTRACED_REASON = "untraced "  # begins the reason of a rejected row, the field follows
ARGUMENT = "chat_template_kwargs."  # begins the name of a template argument: it changes the text, it is not in it
Messages = Sequence[dict[str, Any]]
Render = Callable[..., str]  # (messages, **template arguments) -> text, without a generation prompt


def untraced(messages: Messages, kwargs: Mapping[str, Any], render: Render, template: str) -> tuple[str, ...]:
    """Names of the fields without a trace. `kwargs` are tools and template arguments, `template` is its source."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    shown = list(messages[: answers[-1] + 1]) if answers else list(messages)
    lost = [
        ARGUMENT + name for name in kwargs if name != "tools" and not re.search(rf"\b{re.escape(name)}\b", template)
    ]
    text = render(shown, **kwargs)
    all_there = _in_order(text, shown)
    for index, message in enumerate(shown):
        for name in ("reasoning_content", "tool_calls"):
            if message.get(name) and _without(shown[: index + 1], index, {name: None}, kwargs, render):
                lost.append(name)
        if message["content"] and not all_there and _without(shown, index, {"content": ""}, kwargs, render):
            lost.append("system" if message["role"] == "system" else f"content of {message['role']}")
    if kwargs.get("tools") and _same(render, text, shown, {k: v for k, v in kwargs.items() if k != "tools"}):
        lost.append("tools")
    return tuple(dict.fromkeys(lost))


def refuse_untraced(names: Sequence[str], template_name: str, policy: Untraced) -> None:
    """Reject a row whose fields the template does not render, unless the user trains without them."""
    fields = [name for name in names if not name.startswith(ARGUMENT)]
    if fields and policy == "reject":
        raise Reject(
            UNTRACED_REASON + fields[0],
            f"chat template {template_name!r} does not render {', '.join(fields)}: use a template that does, remove "
            f"the field, or train without it (--untraced train)",
        )


def reasoning_name(template: str) -> str:
    """The key under which a template reads the reasoning of a message."""
    return next((name for name in REASONING_KEYS if reads_key(template, name)), REASONING_KEYS[0])


def with_reasoning_as(messages: Messages, name: str) -> list[dict[str, Any]]:
    """The messages with their reasoning under the key that a template reads."""
    ours = REASONING_KEYS[0]
    if name == ours or not any(ours in message for message in messages):
        return list(messages)
    return [
        {**{key: value for key, value in message.items() if key != ours}, name: message[ours]}
        if ours in message
        else message
        for message in messages
    ]


def reads_key(template: str, name: str) -> bool:
    """Whether a template reads this key of something: `.name`, `['name']`, `get("name")` or `'name' in`."""
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", template) is not None


def _without(messages: Messages, index: int, change: dict[str, Any], kwargs: Mapping[str, Any], render: Render) -> bool:
    """Whether the text of these messages stays the same when message `index` is changed."""
    changed = {key: value for key, value in {**messages[index], **change}.items() if value is not None}
    return _same(render, render(messages, **kwargs), [*messages[:index], changed, *messages[index + 1 :]], kwargs)


def _same(render: Render, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> bool:
    try:
        return render(messages, **kwargs) == text
    except Reject:  # the template misses what was taken away, so it reads it
        return False


def _in_order(text: str, messages: Messages) -> bool:
    """Whether the contents of all messages are in the text as they are, one behind the other."""
    position = 0
    for message in messages:
        content = message["content"]
        for piece in [part.get("text") or "" for part in content] if isinstance(content, list) else [content]:
            position = text.find(piece.strip(), position)
            if position < 0:
                return False
            position += len(piece.strip())
    return True
