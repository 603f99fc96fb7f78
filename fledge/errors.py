"""The error a user can fix.

Its message says what was found, what was needed and what to do, with the values, on one line. `fledge.cli` prints it
without a traceback and exits with status 1; everything else keeps its traceback, because only we can fix it.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, bad flag, bad file: raised at the boundary, shown as one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word: ` (did you mean 'depth'?)`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
