"""Tokens back to text as they arrive. Knows a tokenizer and nothing else."""

from typing import Any


class Detokenizer:
    """The text of one answer, piece by piece; a character split over several tokens waits for its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._given = ""

    @property
    def text(self) -> str:
        """Of all tokens so far."""
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        self._token_ids.append(token)
        text = self.text
        return "" if text.endswith("\ufffd") else self._until(text)

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return self._until(self.text)

    def _until(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
