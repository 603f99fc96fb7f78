"""Text from outside (data, names, answers) where it is shown: on a terminal, in Markdown. HTML is escaped by Jinja.

A terminal obeys control characters and Markdown obeys punctuation. Shown text does neither: it is only read.
"""

import re
import unicodedata

KEPT = "\n\t"
HIDDEN_CATEGORIES = ("Cc", "Cs")  # control characters (ESC among them), halves of surrogate pairs
REORDERING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)}
# An underscore inside a word, as in mt_bench, marks nothing; an ampersand does where an entity may follow.
MARKUP = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=[#\w])|^(?:[-+]|#+|\d+(?=[.)]))(?=[.)]?(?:\s|$))")


def printable(text: str) -> str:
    r"""The text with every character that steers a terminal or turns the reading order as its code, such as `\x1b`."""
    return "".join(_shown(character) for character in text)


def one_line(text: object) -> str:
    """The printable text with every run of white space as one space."""
    return printable(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """One line of Markdown that shows exactly the printable text, in a table cell too: no markup, links or HTML."""
    return MARKUP.sub(_escaped, one_line(text))


def _shown(character: str) -> str:
    if character in KEPT or character.isascii() and character.isprintable():
        return character
    if unicodedata.category(character) in HIDDEN_CATEGORIES or character in REORDERING:
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character


def _escaped(match: re.Match[str]) -> str:
    found = match.group()
    return f"{found}\\" if found.isdigit() else f"\\{found}"
