"""A request and what becomes of it: the tokens it may still emit, and where its time goes.

Everything is checked before anything runs, so every way to decode refuses the same things in the same words.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fledge.data.detokenize import StopStrings
from fledge.decoding.records import Generation, RoundTrace, Sampling
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.quirks import longest_text

OnTokens = Callable[[list[int]], None]
PHASES = ("prefill", "draft", "verify", "accept", "other")


class PromptTooLong(UserError):
    """A prompt that leaves the target no position for an answer."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to answer."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    on_tokens: OnTokens | None = None  # called with every round's new tokens as they appear
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)  # what the target takes beside the ids: pixels
    trace: bool = False  # record every round's tree


class RequestState:
    """A request under way: nothing is emitted after the first stop token, nothing past the limit."""

    def __init__(self, request: Request, limit: int, stop_token_ids: frozenset[int], tokenizer: Any = None) -> None:
        self.request, self.limit = request, limit
        self.token_ids: list[int] = []
        self.num_new = 0  # tokens of the last round
        self.stopped = self.cancelled = self.drafts = False
        self.drafted_depth = 0
        self._stops, self._stop_strings = stop_token_ids, StopStrings(tokenizer, request.sampling.stop)
        self._accepted: list[int] = []
        self._rounds: list[RoundTrace] = []
        self._phases_s = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0  # when its latest tokens appeared

    @property
    def room(self) -> int:
        return self.limit - len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def finished(self) -> bool:
        return self.stopped or self.room == 0 or self.cancelled

    def until_stop_string(self, tokens: list[int]) -> list[int]:
        """A round's tokens, up to the one that completes a stop string."""
        for count in range(1, len(tokens) + 1 if self._stop_strings else 0):
            if self._stop_strings.end_with([*self.token_ids, *tokens[:count]]):
                self.stopped = True
                return tokens[:count]
        return tokens

    def started(self, tokens: list[int], seconds: float) -> list[int]:
        """The prompt was read and gave the first token."""
        self._phases_s["prefill"], self._last = seconds, time.perf_counter()
        return self._emit(tokens)

    def emitted(self, tokens: list[int], phases_s: Mapping[str, float], trace: RoundTrace | None = None) -> list[int]:
        """A round gave these tokens, cut at every stop and at the limit, and its parts took so many seconds. What they
        leave of the time since the last tokens is the host's: `other`."""
        now = time.perf_counter()
        for name, seconds in phases_s.items():
            self._phases_s[name] += seconds
        self._phases_s["other"] += max(now - self._last - sum(phases_s.values()), 0.0)
        self._last = now
        if trace is not None:
            self._rounds.append(trace)
        if self.drafts:
            self._accepted.append(len(tokens) - 1)
        return self._emit(tokens)

    def _emit(self, tokens: list[int]) -> list[int]:
        assert 0 < len(tokens) <= self.room and not self._stops & set(tokens[:-1]), f"{tokens=} {self.room=}"
        self.token_ids += tokens
        self.num_new = len(tokens)
        self.stopped |= tokens[-1] in self._stops
        if self.request.on_tokens is not None:
            self.request.on_tokens(tokens)
        return tokens

    def generation(self) -> Generation:
        """The record of a finished request."""
        return Generation(
            token_ids=self.token_ids,
            accepted=self._accepted,
            drafted_depth=self.drafted_depth,
            finish_reason="stop" if self.stopped else "length",
            ttft_s=self._phases_s["prefill"],
            decode_s=sum(self._phases_s.values()) - self._phases_s["prefill"],
            phases_s=self._phases_s,
            num_forwards=len(self._accepted) if self.drafts else len(self.token_ids) - 1,
            rounds=self._rounds if self.request.trace else None,
        )


def check_request(target: Target, request: Request) -> int:
    """Tokens that may be emitted: what was asked for, at most what the target's positions hold."""
    prompt_ids = request.prompt_ids
    if not len(prompt_ids):
        raise UserError("the prompt has no tokens. Give at least one, such as the beginning-of-sequence token.")
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={request.max_new_tokens} must be at least 1.")
    rows = target.embedding_weight.shape[0]
    if bad := next((token for token in prompt_ids if not 0 <= token < rows), None):
        raise UserError(f"the prompt holds token id {bad}, but {target.name} has ids 0..{rows - 1}. Use its tokenizer.")
    longest = longest_text(target.text_config)
    if longest is None:
        return request.max_new_tokens
    if len(prompt_ids) >= longest:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids)} tokens, but {target.name} has {longest} positions. Shorten the prompt."
        )
    return min(request.max_new_tokens, longest - len(prompt_ids))
