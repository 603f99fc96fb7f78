"""The books of a generation: the tokens it may still emit, and where its time goes."""

import time
from collections.abc import Callable

import torch

from fledge.decoding.records import Generation, RoundTrace

OnTokens = Callable[[list[int]], None]


class Writer:
    """The emitted tokens: nothing after the first EOS, nothing past the limit."""

    def __init__(self, limit: int, eos_token_ids: frozenset[int], on_tokens: OnTokens | None) -> None:
        self.token_ids: list[int] = []
        self.stopped = False
        self._limit, self._eos, self._on_tokens = limit, eos_token_ids, on_tokens

    @property
    def room(self) -> int:
        return self._limit - len(self.token_ids)

    @property
    def finished(self) -> bool:
        return self.stopped or self.room == 0

    def write(self, new: list[int]) -> int:
        """Emit a round's tokens up to EOS or the limit; returns how many."""
        new = new[: self.room]
        for index, token in enumerate(new):
            if token in self._eos:
                new, self.stopped = new[: index + 1], True
                break
        self.token_ids += new
        if self._on_tokens is not None:
            self._on_tokens(new)
        return len(new)

    def generation(
        self, phases_s: dict[str, float], *, accepted: list[int], drafted_depth: int, rounds: list[RoundTrace] | None
    ) -> Generation:
        """Close the books."""
        return Generation(
            token_ids=self.token_ids,
            accepted=accepted,
            drafted_depth=drafted_depth,
            finish_reason="stop" if self.stopped else "length",
            ttft_s=phases_s["prefill"],
            decode_s=sum(phases_s.values()) - phases_s["prefill"],
            phases_s=phases_s,
            num_forwards=len(accepted) if drafted_depth else len(self.token_ids) - 1,
            rounds=rounds,
        )


class Clock:
    """Where the time goes: each lap belongs to the phase that just ended. Waits for the device before it reads."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self.phases_s = dict.fromkeys(("prefill", "draft", "verify", "accept", "other"), 0.0)
        self._last = self._now()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.phases_s[phase] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()
