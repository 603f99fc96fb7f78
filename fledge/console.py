"""What fledge says on a terminal: one rich console on stderr, progress bars, tables.

stdout stays free for results that programs read. Where stderr is no terminal (a log file, CI) a progress bar becomes
one plain line every ten seconds, so that logs stay readable and never look dead. Secrets are taken out of every line.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fledge.escaping import one_line, printable
from fledge.redaction import redact

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_LINE_EVERY_S = 10.0


def say(message: str) -> None:
    """One line of ordinary information."""
    console.print(printable(redact(message)), markup=False)


def warn(message: str) -> None:
    """Something the user should know but that does not stop the run."""
    console.print(printable(f"warning: {redact(message)}"), style="yellow", markup=False)


def show_error(message: str) -> None:
    """What ended the command, on one line."""
    console.print(f"error: {one_line(redact(message))}", style="bold red", markup=False)


def print_document(document: Any) -> None:
    """A document for a program, as JSON on stdout; a person at a terminal has been told in words."""
    if not sys.stdout.isatty():
        print(json.dumps(document))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A small table; the first column is left-aligned, the others right."""
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*[Text(printable(redact(str(cell)))) for cell in row])
    console.print(table)


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


class ProgressBar(Protocol):
    """What a loop needs of its progress display."""

    def advance(self, steps: int = 1, note: str | None = None) -> None: ...


class _NoBar:
    def advance(self, steps: int = 1, note: str | None = None) -> None:
        pass


NO_BAR: ProgressBar = _NoBar()


class _RichBar:
    def __init__(self, bars: Progress, task) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": escape(printable(note))}
        self._bars.update(self._task, advance=steps, **fields)


class _TimeLeft(TimeRemainingColumn):
    """Nothing before the first steps tell how long one takes."""

    def render(self, task: Task) -> Text:
        if task.completed < task.fields["telling"]:
            return Text("-:--:--", style="progress.remaining")
        return super().render(task)


class _PlainBar:
    def __init__(self, title: str, total: int | None, done: int, at_once: int) -> None:
        self._title, self._total, self._done, self._note = title, total, done, ""
        self._start = self._last = time.monotonic()
        self._first_done, self._telling = done, done + at_once

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self._done += steps
        self._note = note if note is not None else self._note
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_EVERY_S or self._done == self._total:
            self._last = now
            say(f"{self._title}: {self._done}/{self._total or '?'} {self._note} {self._remaining(now)}".rstrip())

    def _remaining(self, now: float) -> str:
        fresh = self._done - self._first_done
        if not self._total or self._done < self._telling or self._done >= self._total:
            return f"({now - self._start:.0f} s)"
        return f"({now - self._start:.0f} s, {(now - self._start) / fresh * (self._total - self._done):.0f} s left)"


_shown: list[Progress] = []  # what is on the terminal


@contextmanager
def progress(title: str, total: int | None, done: int = 0, at_once: int = 1) -> Iterator[ProgressBar]:
    """A progress bar over `total` steps (None: unknown), `done` of which a resumed run already has. Inside another one
    it is drawn below it, for as long as it lasts. Of steps that run `at_once`, so many have to end before the time that
    is left can be told: the first to end say little of the others."""
    if not console.is_interactive:
        yield _PlainBar(title, total, done, at_once)
        return
    task_of: dict[str, Any] = {"total": total, "completed": done, "note": "", "telling": done + at_once}
    if _shown:
        task = _shown[-1].add_task(title, **task_of)
        try:
            yield _RichBar(_shown[-1], task)
        finally:
            _shown[-1].remove_task(task)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        _TimeLeft(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        _shown.append(bars)
        try:
            yield _RichBar(bars, bars.add_task(title, **task_of))
        finally:
            _shown.pop()


def form(number: int, singular: str, plural: str) -> str:
    """The word that goes with a count."""
    return singular if number == 1 else plural


def counted(number: int, noun: str) -> str:
    """`1 answer`, `2 answers`."""
    return f"{number} {form(number, noun, noun + 's')}"
