"""What goes into a generation and what comes out: sampling, the generation itself and its trace.

Plain records. Knows nothing of models; the numbers are defined here and nowhere else.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fledge.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the target's logits, in transformers' order: repetition penalty, temperature, top-k,
    top-p, min-p, then a draw."""

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the target's own distribution"""
    top_p: float = 1.0
    """keep the most likely tokens that together hold this share of the probability"""
    top_k: int = 0
    """keep this many most likely tokens; 0 keeps all"""
    seed: int | None = None
    """seed of the draws; None takes a fresh one"""
    min_p: float = 0.0
    """keep tokens whose probability is at least this share of the likeliest one's; 0 keeps all"""
    repetition_penalty: float = 1.0
    """divides positive logits, and multiplies negative ones, of tokens that prompt or answer hold already; 1 is off"""
    stop: tuple[str, ...] = ()
    """strings that end an answer, wherever tokens begin and end; the token that completes one is the last"""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or positive.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token.")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be 0 (keep every token) or positive.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must lie in [0, 1]; 0 keeps every token.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be positive and finite; 1 is off.")

    @property
    def penalises(self) -> bool:
        """Whether a choice depends on the tokens before it beyond the logits."""
        return self.repetition_penalty != 1

    @property
    def takes_the_argmax(self) -> bool:
        return self.temperature == 0 and not self.penalises

    @cached_property
    def law(self) -> "Sampling":
        """The same without the seed and the stop strings: requests of one law are drawn together."""
        return replace(self, seed=None, stop=())


@dataclass(frozen=True)
class RoundTrace:
    """One round as a tree: node 0 is the root; node i continues node parents[i]."""

    token_ids: list[int]
    parents: list[int]
    accepted: list[int]  # nodes kept, root first, in order; cut at EOS or the length limit
    bonus: int | None  # the target's own token after the last kept node; None when the cut fell before it
    scores: list[float] | None = None  # of the nodes; None where the drafter gives none


@dataclass(frozen=True)
class Generation:
    """What one call generated, and where the time went."""

    token_ids: list[int]  # EOS included when it was generated; nothing after it, nothing past the limit
    accepted: list[int]  # per verification round: tokens emitted - 1, counted after the cut; plain: []
    drafted_depth: int  # levels drafted per round; 0 for plain decoding
    finish_reason: Literal["stop", "length"]
    ttft_s: float  # prompt in -> first token known
    decode_s: float  # everything after the first token
    phases_s: dict[str, float]  # prefill, draft, verify, accept, other
    num_forwards: int  # target forwards after prefill
    rounds: list[RoundTrace] | None = None

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: the tokens after the first over the time after the first."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s else 0.0

    @property
    def tau(self) -> float:
        """Tokens per target forward, bonus included; the prefill's token belongs to no round. NaN without rounds."""
        return (len(self.token_ids) - 1) / self.num_forwards if self.num_forwards else float("nan")
