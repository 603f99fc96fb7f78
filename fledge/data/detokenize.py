"""Tokens back to text as they arrive, up to a stop string. Knows a tokenizer and nothing else.

A stop string may begin and end within tokens, so it is looked for in text. The answer ends with the token that
completes it, and its text ends before it.
"""

from collections.abc import Sequence
from typing import Any

from fledge.errors import UserError

MOST_BYTES = 4  # of a character: the most tokens it can be split over


class StopStrings:
    """The strings that end an answer; perhaps none. One that is a control token of the tokenizer ends it as well."""

    def __init__(self, tokenizer: Any, strings: Sequence[str] = ()) -> None:
        if "" in strings:
            raise UserError("a stop string is empty; it would end every answer. Leave it out, or name a text.")
        if strings and tokenizer is None:
            raise UserError("stop strings are looked for in text; give the target its tokenizer.")
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        added = tokenizer.get_added_vocab() if strings else {}
        self._control = {added[string] for string in strings if string in added}

    def __bool__(self) -> bool:
        return bool(self._strings)

    def end_with(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens of an answer completes a stop string."""
        if token_ids[-1] in self._control:
            return True
        tail = self._tokenizer.decode(token_ids[-MOST_BYTES * (self._longest + 1) :], skip_special_tokens=True)
        return any(string in tail for string in self._strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((text.index(string) for string in self._strings if string in text), default=len(text))]

    def certain(self, text: str) -> str:
        """What can be shown of a growing text: nothing of a stop string, nor of an end that may become one."""
        text = self.cut(text)
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return text[:-length]
        return text


def answer_text(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of an answer, up to the first of the stop strings."""
    return StopStrings(tokenizer, stop).cut(tokenizer.decode(token_ids, skip_special_tokens=True))


class Detokenizer:
    """The text of one answer, piece by piece. A character split over several tokens waits for its last one, and what
    may be the beginning of a stop string for what follows."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, StopStrings(tokenizer, stop)
        self._token_ids: list[int] = []
        self._given = ""

    @property
    def text(self) -> str:
        """Of all tokens so far."""
        return self._stop.cut(self._tokenizer.decode(self._token_ids, skip_special_tokens=True))

    def add(self, token: int) -> str:
        """The text that this token makes certain; it may be empty."""
        self._token_ids.append(token)
        text = self.text
        return "" if text.endswith("\ufffd") else self._until(self._stop.certain(text))

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return self._until(self.text)

    def _until(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
