"""Limits for chat templates, which are programs of whoever made the model: on time, length and operators.

Transformers renders them in Jinja's sandbox, which keeps them from our files but not from looping. A watching thread
raises an exception in a rendering thread that has used up its CPU time; signals would reach the main thread only.
Python delivers the exception between two operations of the template. One operation alone is not interrupted: hence the
refusal of `**`, whose result may take years. What a template may make in memory is counted (`template_memory.py`).
"""

import ctypes
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jinja2

from fledge.data.template_memory import within_budget

RENDER_CPU_S = 3.0  # an ordinary conversation takes milliseconds
LONGEST_RENDERING = 16 << 20  # characters, more than any context holds
CHECK_EVERY_S = 0.1
Result = TypeVar("Result")


class _Stopped(BaseException):
    """Raised in a thread by the watching one. Not an Exception, so that nothing on the way catches it."""


@dataclass(frozen=True)
class _Watched:
    thread: int
    clock: int | None  # the thread's CPU clock; None where there is none: elapsed time
    end: float


# Shared with the watching thread without a lock: an exception that arrives while one is taken would never release it.
# Taking an entry out of the dictionary is atomic, and only who takes it out may raise, or be done.
_watched: dict[int, _Watched] = {}
_numbers = itertools.count()
_busy = threading.Event()
_watcher: threading.Thread | None = None


def within_cpu_time(function: Callable[[], Result], seconds: float) -> Result:
    """The function's result. TimeoutError when this thread has worked on it for so long."""
    number = _watch(seconds)
    try:
        try:
            result = function()
        except _Stopped:
            raise
        except BaseException:
            _unwatch(number)
            raise
        _unwatch(number)
        return result
    except _Stopped:
        raise TimeoutError(f"it was stopped after {seconds:g} s of CPU time") from None


def within_limits(template: str, render: Callable[[], Result]) -> Result:
    """What `render` makes of a template. ValueError or TimeoutError where it would take too long, or too much."""
    line = line_of_power(template)
    if line is not None:
        raise ValueError(f"line {line} uses the operator `**`, which may compute for ever and no chat template needs")
    with within_budget():
        return within_cpu_time(render, RENDER_CPU_S)


def refuse_long(text: str) -> str:
    """The text itself. ValueError when it is longer than any context."""
    if len(text) > LONGEST_RENDERING:
        raise ValueError(f"it rendered {len(text):,} characters; {LONGEST_RENDERING:,} are allowed")
    return text


@functools.lru_cache
def line_of_power(template: str) -> int | None:
    """The line of a template with `**`: Jinja computes constants such as 9**9**9 before anything is rendered."""
    try:
        return next((line for line, _, value in jinja2.Environment().lex(template) if value == "**"), None)
    except jinja2.TemplateSyntaxError:
        return None  # rendering says what is wrong


def _watch(seconds: float) -> int:
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_stop_late_threads, name="template limits", daemon=True)
        _watcher.start()
    thread, number = threading.get_ident(), next(_numbers)
    clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
    _watched[number] = _Watched(thread, clock, _now(clock) + seconds)
    _busy.set()
    return number


def _unwatch(number: int) -> None:
    """Done in time. If the watching thread was faster, its exception is on the way: wait for it here."""
    if _watched.pop(number, None) is None:
        while True:
            time.sleep(0.001)


def _stop_late_threads() -> None:
    while True:
        _busy.wait()
        time.sleep(CHECK_EVERY_S)
        _busy.clear()
        for number, one in list(_watched.items()):
            _busy.set()
            if _now(one.clock) > one.end and _watched.pop(number, None) is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(one.thread), ctypes.py_object(_Stopped))


def _now(clock: int | None) -> float:
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _forget_threads() -> None:
    """A forked process has none of its parent's threads."""
    global _watcher, _busy
    _watched.clear()
    _watcher, _busy = None, threading.Event()


os.register_at_fork(after_in_child=_forget_threads)
