"""The error a user can fix.

Its message says what was found, what was needed and what to do, with the values, on one line. `fledge.cli` prints it
without a traceback and exits with status 1; everything else keeps its traceback, because only we can fix it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input, bad flag, bad file: raised at the boundary, shown as one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word: ` (did you mean 'depth'?)`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def refuse_missing_folder(name_or_path: str) -> None:
    """A UserError where a target is named like a path that is not there: libraries would speak of the hub."""
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if is_path and not Path(name_or_path).expanduser().exists():
        raise UserError(f"{name_or_path}: no such folder. Give the target's folder or its name on the hub.")
