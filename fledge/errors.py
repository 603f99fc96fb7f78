"""The error a user can fix.

Its message says what was found, what was needed and what to do, with the values, on one line. `fledge.cli` prints it
without a traceback and exits with status 1; everything else keeps its traceback, because only we can fix it. An error
of the operating system (a full disk, no permission) is the user's, too: `explained` makes a sentence of it.
"""

import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC: "No space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "File too large"}


class UserError(ValueError):
    """Bad input, bad flag, bad file: raised at the boundary, shown as one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word: ` (did you mean 'depth'?)`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def is_path(name: str) -> bool:
    """Whether a target is named like no model on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def refuse_missing_folder(name_or_path: str) -> None:
    """A UserError where a target is named like a path that is not there: libraries would speak of the hub."""
    if is_path(name_or_path) and not Path(name_or_path).expanduser().exists():
        raise UserError(f"{name_or_path}: no such folder. Give the target's folder or its name on the hub.")


@contextmanager
def naming(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Within, errors of the system name `path` where they name none, and what is needed where that is known.

    safetensors wraps a full disk in its own type: it is recognised by its words.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = next((number for number, words in FULL.items() if words in str(error)), None)
        if isinstance(error, OSError) and error.errno is not None:
            found = error
            found.filename = found.filename if found.filename is not None else str(path)
        elif number is not None:
            found = OSError(number, os.strerror(number), str(path))
        else:
            raise
        if needed_bytes is not None:
            found.add_note(f"{gib(needed_bytes)} are needed")
        raise found from (None if found is error else error)


def explained(error: OSError) -> str:
    """A sentence that names the path, what is wrong and what to do."""
    if error.errno is None or error.filename is None:
        return str(error)
    path, problem, advice = Path(os.fsdecode(error.filename)), (error.strerror or "").lower(), ""
    if error.errno in FULL:
        free = f"{gib(free_bytes(path))} free"
        problem = f"cannot be written, {problem} ({', '.join([*getattr(error, '__notes__', ()), free])})"
        advice = " Make room or choose a folder on another disk, and run the same command again."
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = f" User {os.getuid()} needs the right to it; give it, or choose another folder."
    elif error.errno == errno.EROFS:
        advice = " Choose a folder on another file system."
    return f"{path}: {problem}.{advice}"


def gib(size: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def free_bytes(path: Path) -> int:
    """The free space on the disk where `path` is or would be."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(there).free
