r"""Thoughts at the start of an answer: which are the assistant's words, and which are the template's filler.

Text only. A reasoning model's prompt may end inside a thought (`<think>\n`) or behind an empty one (thinking off), and
a template may write an empty thought before an answer that has none. What it writes need not continue what it asks:

    family         the prompt ends with             an answer without a thought is rendered as
    Qwen3          (nothing)                        <think>\n\n</think>\n\nSix.   filler
    Qwen3.5        <think>\n                        <think>\n\n</think>\n\nSix.   filler, partly in the prompt
    Nemotron 3     <think>\n                        <think></think>Six.           filler that differs from the prompt
    DeepSeek R1    <think>\n                        Six.                          thoughts are left out, written or not
    DeepSeek V3.1  <think>                          </think>Six.                  so are these, but for their end
    Gemma 4        <|channel>thought\n<channel|>    Six.                          the filler is in the prompt alone

`continue_prompt` gives the text as the target wrote it: the prompt, the row's own thought if it has one, the answer.
"""

import re
from typing import Any

MARKS = {
    "<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>", "<|channel>thought\n": "<channel|>",
}  # fmt: skip
OPENING = f"(?:{'|'.join(map(re.escape, MARKS))})"
CLOSING = f"(?:{'|'.join(map(re.escape, MARKS.values()))})"
TAIL = 100  # characters of a prompt in which its thought is looked for

CLOSE = re.compile(CLOSING)
AT_END = re.compile(rf"(?P<mark>{OPENING})\s*(?P<closing>{CLOSING}\s*)?$")
EMPTY = re.compile(rf"\s*({OPENING})\s*{CLOSING}\s*")
REST_OF_EMPTY = re.compile(rf"\s*{CLOSING}\s*")
BEGINNING = re.compile(rf"\s*{OPENING}")


def thought_of(message: dict[str, Any]) -> str:
    """The reasoning of a message: its own field, or what its content holds before the end of a thought."""
    if reasoning := message.get("reasoning_content"):
        return str(reasoning).strip()
    if not _is_closed(message):
        return ""
    thought = CLOSE.split(_content(message), maxsplit=1)[0]
    return BEGINNING.sub("", thought, count=1).strip()


def continue_prompt(prompt: str, text: str, message: dict[str, Any]) -> tuple[str, int] | None:
    """(text, where the assistant's words begin) of a rendering `text` of the prompt and its answer `message`.

    The text changes only where the template does not write thoughts as it asks for them. None: no continuation.
    """
    tail = prompt[-TAIL:]
    asked = AT_END.search(tail)
    if text.startswith(prompt):
        return _behind_filler(prompt, text, message, is_open=asked is not None and not asked["closing"])
    if asked is None or not text.startswith(prompt[: len(prompt) - len(asked[0])]):
        return None
    start = len(prompt) - len(asked[0])
    rest, thought = text[start:], thought_of(message)
    empty = EMPTY.match(rest) or REST_OF_EMPTY.match(rest)
    answer = rest[empty.end() :] if empty else rest
    if asked["closing"]:  # thinking is off: the target saw the prompt's empty thought, the row can hold no other
        return None if thought or BEGINNING.match(answer) else (prompt + answer, len(prompt))
    if beginning := BEGINNING.match(answer):
        own = _behind_break(prompt, answer, beginning.end())
        return (prompt + answer[own:], len(prompt)) if empty else (text, start + own)
    if thought:
        return prompt + _written_thought(message, asked) + answer.lstrip("\n"), len(prompt)
    blank = _num_blanks(rest) if _is_closed(message) else 0
    return text, start + (empty.end() if empty else blank)


def end_of_thought(message: dict[str, Any], text: str, start: int) -> int | None:
    """Where the thought of a message without any other words ends in `text`; None if it has words, or no thought."""
    thought = thought_of(message)
    if not thought or _content(message).strip() or (place := text.find(thought, start)) < 0:
        return None
    return place + len(thought)


def _is_closed(message: dict[str, Any]) -> bool:
    """Whether the content itself holds the end of a thought."""
    content = _content(message)
    return any(mark in content for mark in MARKS.values())  # many times faster than the pattern


def _behind_filler(prompt: str, text: str, message: dict[str, Any], is_open: bool) -> tuple[str, int]:
    """The text continues the prompt: its words begin behind an empty thought that is not the row's own.

    A thought in the content that the template does not read (Qwen3.8, or one cut before its end) stands behind the
    filler; it takes the filler's place.
    """
    start = len(prompt)
    filler = (REST_OF_EMPTY if is_open else EMPTY).match(text, start)
    if filler is None:  # an empty thought of the row that the template leaves out, but for its line breaks
        blank = _is_closed(message) and not thought_of(message)
        return text, start + (_num_blanks(text[start:]) if blank else 0)
    if is_open and (empty := EMPTY.match(text, filler.end())):
        return text[: filler.end()] + text[empty.end() :], filler.end()
    if beginning := BEGINNING.match(text, filler.end()):
        own = _behind_break(prompt, text, beginning.end())
        return prompt + (text[own:] if is_open else text[start : filler.start(1)] + text[filler.end() :]), start
    own_thought = thought_of(message) or (_is_closed(message) and not is_open)
    return text, start if own_thought else filler.end()


def _written_thought(message: dict[str, Any], asked: re.Match[str]) -> str:
    r"""A thought behind its opening in the prompt: as the content has it, or with the opening's own line breaks
    (`<think>\n` is closed by `\n</think>\n\n`, `<think>` by `</think>`)."""
    content = _content(message)
    if close := CLOSE.search(content):
        opening = BEGINNING.match(content)
        behind = content[close.end() :]
        begin = _behind_break(asked[0], content, opening.end()) if opening else 0
        return content[begin : close.end()] + behind[: _num_blanks(behind)]
    apart = asked[0].endswith("\n") and asked["mark"] == asked["mark"].rstrip()
    closing = MARKS[asked["mark"]]
    return thought_of(message) + (f"\n{closing}\n\n" if apart else closing)


def _behind_break(prompt: str, text: str, end: int) -> int:
    """Behind the opening that ends at `end`, and behind its line break if the prompt has that, too."""
    return end + (prompt.endswith("\n") and text.startswith("\n", end))


def _num_blanks(text: str) -> int:
    return len(text) - len(text.lstrip())


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
