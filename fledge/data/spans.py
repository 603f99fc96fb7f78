r"""Where in a rendered conversation the assistant speaks. Text only: no tokenizer, no tensors.

The trick: the prompt of turn i, rendered with its generation prompt, is what the target saw when it wrote turn i. So
the answer of turn i is what a rendering that ends with turn i adds to that prompt:

    render(messages[:i], generation prompt)   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    render(messages[:i+1])                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    supervised                                                                                       Hello<|im_end|>

A template may render an old turn differently from how the target wrote it (Qwen3 strips earlier thoughts, gpt-oss ends
only its last turn with <|return|>). Such a turn is no part of the full rendering; it becomes a rendering of its own,
which ends with that turn. A template whose prompt is not a prefix of its own continuation cannot be masked.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text

EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


class Unmaskable(Exception):
    """The template's prompt is not a prefix of what it renders once the answer is there."""


@dataclass(frozen=True)
class Rendering:
    """A text with the character spans the assistant wrote; `turn` is the message a split-off rendering ends with."""

    text: str
    spans: tuple[tuple[int, int], ...]
    turn: int | None = None


def supervised_renderings(messages: Messages, render: Render, end_tokens: tuple[str, ...]) -> list[Rendering]:
    """The full rendering with every turn it renders as written, then one rendering per turn it does not."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: answers[-1] + 1]
    full = render(messages, False)
    spans: list[tuple[int, int]] = []
    apart: list[Rendering] = []
    for index in answers:
        text = full if index == answers[-1] else render(messages[: index + 1], False)
        start, end = answer_span(messages, index, text, render, end_tokens)
        if full.startswith(text[:end]):
            spans.append((start, end))
        else:
            apart.append(Rendering(text, ((start, end),), index))
    return [Rendering(full, tuple(spans)), *apart]


def answer_span(
    messages: Messages, index: int, text: str, render: Render, end_tokens: tuple[str, ...]
) -> tuple[int, int]:
    """Characters of message `index` in `text`, a rendering that ends with it: the answer and its end-of-turn token."""
    prompt = render(messages[:index], True)
    if not text.startswith(prompt):
        same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
        raise Unmaskable(
            f"turn {index}: the prompt renders as ...{prompt[max(0, same - 30) : same + 30]!r} but with its answer "
            f"the same place reads ...{text[max(0, same - 30) : same + 30]!r}"
        )
    start, message = len(prompt), messages[index]
    content = str(message.get("content") or "")
    if "<think>" not in content and not message.get("reasoning_content") and not message.get("thinking"):
        if thought := EMPTY_THOUGHT.match(text, start):
            start = thought.end()  # the template's own filler, not the assistant's words
    content_end, turn_end = answer_end(text, start, end_tokens)
    return start, content_end if message.get("finish_reason") == "length" else turn_end


def answer_end(text: str, start: int, end_tokens: tuple[str, ...]) -> tuple[int, int]:
    """Where the words end, and where the end-of-turn token after them ends (the same place if there is none).

    What follows the words is template: whitespace and control tokens, of which the first is the assistant's own.
    """
    end, turn_end = len(text), None
    while True:
        end = start + len(text[start:end].rstrip())
        token = next((token for token in end_tokens if text.endswith(token, start, end)), None)
        if token is None:
            return end, end if turn_end is None else turn_end
        end, turn_end = end - len(token), end
