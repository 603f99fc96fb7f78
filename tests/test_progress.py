"""The time that a bar says is left."""

import itertools

import pytest
from rich.progress import Progress

from fledge import console
from fledge.console import progress


@pytest.fixture
def lines(monkeypatch):
    """Plain lines, one for every step; a step ends every ten seconds, the first ten of them together after a minute."""
    monkeypatch.setattr(console, "PLAIN_LINE_EVERY_S", 0.0)
    found: list[str] = []
    monkeypatch.setattr(console, "say", found.append)
    times = itertools.chain([0.0], [60.0] * 10, itertools.count(60.0, 60.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    return found


def test_the_first_of_many_at_once_say_nothing_of_the_rest(lines):
    with progress("rows", 40, at_once=10) as bar:
        for _ in range(11):
            bar.advance()
    assert not any("left" in line for line in lines[:9])  # one row a minute would be 39 minutes
    assert "180 s left" in lines[9]


def test_one_after_the_other_says_it_at_once(lines):
    with progress("rows", 4) as bar:
        bar.advance()
    assert lines == ["rows: 1/4  (60 s, 180 s left)"]


def test_a_terminal_waits_too():
    times = itertools.count(0.0, 10.0)
    bars = Progress(console._TimeLeft(), get_time=lambda: next(times))
    tasks = [bars.add_task("rows", total=8, telling=at_once) for at_once in (1, 4)]
    for _ in range(3):
        for task in tasks:
            bars.advance(task)
    soon, later = (console._TimeLeft().render(task).plain for task in bars.tasks)
    assert later == "-:--:--" != soon
    bars.advance(tasks[1])
    assert console._TimeLeft().render(bars.tasks[1]).plain != "-:--:--"
