"""What training shows: a bar on a terminal, and one short line for every log step, evaluation and decoding.

Trackers (--report_to) and trainer_state.json get every metric. transformers' own callbacks print a dict a step.
"""

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from transformers import TrainerCallback

from fledge.console import NO_BAR, ProgressBar, console, duration, progress, say

POSITIONS_SHOWN = 8


class ShownProgress(TrainerCallback):
    """The bar and the lines of the process that saves; other processes show nothing."""

    def __init__(self, *, on: bool, verbose: bool = False) -> None:
        self.on, self.verbose = on, verbose
        self._open = ExitStack()
        self._bar: ProgressBar = NO_BAR
        self._start, self._first_step = time.monotonic(), 0

    def bar(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        """A bar for a part of the run, such as an evaluation."""
        return progress(title, total) if self.on else nullcontext(NO_BAR)

    def close(self) -> None:
        """Give the terminal back, however training ended."""
        self._open.close()
        self._bar = NO_BAR

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        if self.on and console.is_interactive:  # elsewhere the lines of the log steps are enough
            self._bar = self._open.enter_context(progress("training", state.max_steps, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        step = f"step {state.global_step}/{state.max_steps}"
        if not self.on:
            return
        if self.verbose:
            say(f"{step}  " + "  ".join(f"{name} {value:.4g}" for name, value in logs.items()))
        elif "loss" in logs:
            left = "" if console.is_interactive else f"  {self._left(state)}"
            say(f"{step}  {figures(logs)}  {logs['tokens_per_s']:,.0f} tok/s{left}")
        elif "eval_loss" in logs:
            say(f"{step}  held out: {figures(logs, 'eval_')}")
        elif "decode_tau" in logs:
            say(f"{step}  decoded: tau {logs['decode_tau']:.3f} ({logs['decode_tokens']} tokens)")

    def _left(self, state: Any) -> str:
        done = max(state.global_step - self._first_step, 1)
        seconds = (time.monotonic() - self._start) / done * (state.max_steps - state.global_step)
        return f"{duration(seconds)} left"


def figures(logs: dict[str, Any], prefix: str = "") -> str:
    """Loss, predicted tau, and the share of tokens guessed right at each draft position."""
    shares = [f"{100 * logs[name]:.0f}" for k in range(POSITIONS_SHOWN) if (name := f"{prefix}acc_{k}") in logs]
    more = " ..." if f"{prefix}acc_{POSITIONS_SHOWN}" in logs else ""
    found = [f"loss {logs[f'{prefix}loss']:.3f}"]
    if f"{prefix}tau" in logs:
        found += [f"tau {logs[f'{prefix}tau']:.2f}", f"right {' '.join(shares)}{more} %"]
    return "  ".join(found)
