r"""Where in a rendered conversation the assistant speaks. Text only: no tokenizer, no tensors.

The trick: the prompt of turn i, rendered with its generation prompt, is what the target saw when it wrote turn i. So
the answer of turn i is what a rendering that ends with turn i adds to that prompt:

    render(messages[:i], generation prompt)   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    render(messages[:i+1])                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    supervised                                                                                       Hello<|im_end|>

The answer ends with the token at which the target stops, whatever control tokens come before it. Where that token opens
the next turn (GLM's <|user|>), a rendering that ends with the answer lacks it, and it is appended: the target wrote it.

A template may render an old turn differently from how the target wrote it (Qwen3 strips earlier thoughts, gpt-oss ends
only its last turn with <|return|>). Such a turn is no part of the full rendering; it becomes a rendering of its own,
which ends with that turn. What thoughts add to this is in `thoughts.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fledge.data.rejects import Reject
from fledge.data.thoughts import continue_prompt, end_of_thought

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text
Spans = tuple[tuple[int, int], ...]

NEXT_MESSAGE = "the message that follows"


class Unmaskable(Exception):
    """The template's prompt is not a prefix of what it renders once the answer is there."""


@dataclass(frozen=True)
class Ends:
    """Texts of the control tokens that may follow an answer, longest first, and of those at which the target stops."""

    control: tuple[str, ...]
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendering:
    """A text with the character spans the assistant wrote; `turn` is the message a split-off rendering ends with."""

    text: str
    spans: Spans
    turn: int | None = None


@dataclass(frozen=True)
class AnswerEnd:
    """Where an answer's words end, where its end of turn ends (the same place if it has none), and whether the target
    stops there."""

    words: int
    turn: int
    stops: bool


def trained_answers(messages: Messages, last_turn_only: bool = False) -> list[int]:
    """Indices of the assistant's messages to supervise: all but those the row excludes, or of the last one alone."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if last_turn_only else answers
    return [index for index in chosen if messages[index].get("train") is not False]


def supervised_renderings(messages: Messages, answers: Sequence[int], render: Render, ends: Ends) -> list[Rendering]:
    """The rendering up to the last of `answers`, with each of them that it holds as written; then one rendering for
    each of the others."""
    written = [answer_of(messages, index, render, ends) for index in answers]
    full = written[-1].text
    spans: list[tuple[int, int]] = []
    apart: list[Rendering] = []
    for answer in written:
        (span,) = answer.spans
        if full.startswith(answer.text[: span[1]]):
            spans.append(span)
        else:
            apart.append(answer)
    return [Rendering(full, tuple(spans)), *apart]


def answer_of(messages: Messages, index: int, render: Render, ends: Ends) -> Rendering:
    """Message `index` behind its prompt, as the target wrote it: the answer and its end of turn."""
    prompt, rendered, message = render(messages[:index], True), render(messages[: index + 1], False), messages[index]
    continued = continue_prompt(prompt, rendered, message)
    if continued is None and (answer := _behind_question(prompt, rendered, messages[:index])):
        continued = continue_prompt(prompt, prompt + answer, message)
    if continued is None:
        same = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        raise Unmaskable(
            f"turn {index}: the prompt renders as ...{prompt[max(0, same - 30) : same + 30]!r} but with its answer "
            f"the same place reads ...{rendered[max(0, same - 30) : same + 30]!r}"
        )
    text, start = continued
    end = answer_end(text, start, ends)
    if message.get("finish_reason") == "length":
        cut = end_of_thought(message, text, start)
        return Rendering(text, ((start, end.words if cut is None else cut),), index)
    if not end.stops and (stop := _stop_behind(messages, index, rendered, render, ends)):
        text = text.rstrip() + stop
        return Rendering(text, ((start, len(text)),), index)
    return Rendering(text, ((start, end.turn),), index)


def _behind_question(prompt: str, rendered: str, before: Messages) -> str:
    """What `rendered` adds behind the last message before the answer, if that and the generation prompt are the same.

    Mistral's templates write the system text into the last message: with the answer there, that is none of the user.
    """
    question = before[-1].get("content") if before else None
    if not isinstance(question, str) or not question or question not in prompt:
        return ""
    _, found, answer = rendered.rpartition(prompt[prompt.rindex(question) :])
    return answer if found else ""


def answer_end(text: str, start: int, ends: Ends) -> AnswerEnd:
    """Where the answer that begins at `start` and runs to the end of `text` ends.

    What follows the words is whitespace and control tokens. The answer's own go up to the first at which the target
    stops; where there is none, only the first is taken for its own.
    """
    end, behind = len(text), []
    while True:
        end = start + len(text[start:end].rstrip())
        token = next((token for token in ends.control if text.endswith(token, start, end)), None)
        if token is None:
            break
        behind.append((token, end))
        end -= len(token)
    for token, token_end in reversed(behind):
        if token in ends.stops:
            return AnswerEnd(end, token_end, True)
    return AnswerEnd(end, behind[-1][1] if behind else end, False)


def within_marks(rendering: Rendering, rendered: str, marks: Spans, ends: Ends) -> Rendering:
    """The rendering, supervised only inside what its template marks as the assistant's; ends of turn count as marked.

    `marks` are spans of `rendered`. A text that goes on differently (a thought the template leaves out) stays as it is.
    """
    if not rendering.text.startswith(rendered):
        return rendering
    marked = _with_ends(rendered, marks, ends)
    if marked and len(rendering.text) > len(rendered):  # the end of turn that was appended
        marked[-1] = (marked[-1][0], max(marked[-1][1], len(rendering.text)))
    both = [(max(a, c), min(b, d)) for a, b in rendering.spans for c, d in marked]
    return replace(rendering, spans=tuple((start, end) for start, end in both if start < end))


def marked_rendering(
    messages: Messages, answers: Sequence[int], rendered: str, marks: Spans, ends: Ends
) -> Rendering | None:
    """What a template marks as the assistant's, where its prompts do not tell; None if that is not one span for each
    message of the assistant."""
    every = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) != len(every):
        return None
    spans = []
    for index, span in zip(every, _with_ends(rendered, marks, ends), strict=True):
        if index in answers:
            cut = messages[index].get("finish_reason") == "length"
            spans.append((span[0], answer_end(rendered[: span[1]], span[0], ends).words) if cut else span)
    return Rendering(rendered, tuple(spans))


def _with_ends(text: str, marks: Spans, ends: Ends) -> list[tuple[int, int]]:
    """Marks with the end of turn behind them, and with nothing that follows it."""
    behind = re.compile(rf"(?:\s|{'|'.join(map(re.escape, ends.control)) or '(?!)'})*")
    spans = []
    for start, stop in marks:
        found = behind.match(text, stop)
        end = answer_end(text[: found.end() if found else stop], start, ends)
        spans.append((start, end.turn if end.stops else stop))
    return spans


def _stop_behind(messages: Messages, index: int, rendered: str, render: Render, ends: Ends) -> str | None:
    """The stop token with which the next message opens, and the whitespace before it: what ended the answer.

    Which it is, the next message says (a tool's result, or the user); behind the last answer its tool calls do.
    """
    if not ends.stops:
        return None
    calls = messages[index].get("tool_calls")
    is_last = index + 1 == len(messages)
    role = ("tool" if calls else "user") if is_last else messages[index + 1]["role"]
    following: dict[str, Any] = {"role": role, "content": NEXT_MESSAGE}
    if role == "tool" and calls:
        following |= {"name": calls[0].get("function", {}).get("name", ""), "tool_call_id": calls[0].get("id", "")}
    try:
        longer = render([*messages[: index + 1], following], False)
    except Reject:
        return None
    if NEXT_MESSAGE not in longer:
        return None
    stop = re.compile("|".join(map(re.escape, sorted(ends.stops, key=len, reverse=True))))
    found = list(stop.finditer(longer[: longer.rindex(NEXT_MESSAGE)]))
    before = sum(1 for _ in stop.finditer(rendered))
    if len(found) <= before:
        return None
    answered = longer[: found[before].start()]
    return answered[len(answered.rstrip()) :] + found[before][0]
