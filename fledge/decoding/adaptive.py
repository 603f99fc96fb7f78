"""How much drafting pays, decided in every round from the drafts' scores and from what earlier rounds brought.

    expected tokens of a tree   1 + trust * sum of exp(score) over its drafted nodes
    cost of a round             V(nodes) + D(levels) + o, from the tree profile of this machine

- Drafts that take no time are verified instead of the head's where they promise more tokens per second than plain
  decoding, and than the head's rounds have brought.
- Another level is drafted if the tokens it can add, per second, beat the rate reached so far.
- The number of verified candidates is the one that promises the most tokens per second.
- Rounds are paid from a credit. A round adds what plain decoding of its tokens would have cost and 1 % more, and
  subtracts its own cost. Without credit the target decodes plainly. So drafting costs at most 1 % and the initial
  credit. When drafting begins to pay again, this is noticed at the next round that the 1 % has paid for. The head and
  what takes no time have credits of their own: neither spends what the other earns.
- Profiles have errors, and a head that seems to pay by a little may not. So a round that drafts is charged DOUBT more
  than the profile says, and no tree is assumed to cost less than a smaller one. With a head that is never right, total
  time stays within 2 % of plain decoding (benchmarks/decode_adaptive.py).

Costs come from the profile, not from a clock. A tree is therefore a function of the tokens before it, so the output
keeps the target's law and a run repeats itself. Knows scores and costs. Knows nothing of models or tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fledge.decoding.tree_profile import TreeProfile
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError

ALLOWANCE = 0.01  # of plain decoding's time that drafting may lose by the profile; 2 % is what is promised
DOUBT = 0.05  # of a drafting round: what the profile may be wrong by
FIRST_CREDIT = 2.0  # plain forwards: about eight rounds that lose a quarter of one
MOST_CREDIT = 8.0
MEMORY = 0.9  # weight of the past in the running figures, per round
LONG_MEMORY = 0.98  # where trees change between answers only
FIRST_GAIN = 1.5  # tokens beyond one of the largest tree's round, before there was one
RETRY = 16  # plain answers, after which a draft is tried again


class AdaptiveBudget:
    """The `drafters.base.Budget` of one sequence after another; keep one over many generations."""

    def __init__(
        self, *, plain_s: float, verify_s: dict[int, float], draft_s: dict[int, float], overhead_s: float
    ) -> None:
        """Seconds: plain_s of V(1), verify_s by nodes, draft_s by levels, overhead_s of the rest of a round."""
        self.plain_s = plain_s
        sizes = sorted(verify_s)
        rising = np.maximum.accumulate([verify_s[size] for size in sizes])  # one node measured fast is noise
        self._verify = np.interp(np.arange(max(sizes) + 1), sizes, rising)
        self._draft = [0.0, *(draft_s[level] for level in sorted(draft_s))]
        self._overhead = overhead_s
        self._credit = self._free_credit = FIRST_CREDIT * plain_s
        self._trust, self._continues = 1.0, 0.7  # accepted / promised tokens; share of a level's promise the next keeps
        self._rate = 1.0 / plain_s
        self._levels, self._nodes, self._promise, self._promised = 0, 0, 0.0, 0.0  # of the round under way

    @classmethod
    def from_profile(cls, profile: TreeProfile, shape: TreeShape) -> "AdaptiveBudget":
        """The costs that `fledge bench --tune` measured for trees of this shape."""
        measured = {
            int(name.split("x")[1]): float(seconds)
            for name, seconds in profile.costs["draft_s"].items()
            if int(name.split("x")[0]) == shape.top_k
        }
        verify_s = {int(nodes): float(seconds) for nodes, seconds in profile.costs["verify_s"].items()}
        if shape.levels > max(measured, default=0) or shape.total_token > max(verify_s):
            widths = sorted({int(name.split("x")[0]) for name in profile.costs["draft_s"]})
            raise UserError(
                f"the tree profile has no costs for total_token {shape.total_token}, depth {shape.depth}, top_k "
                f"{shape.top_k}: it knows top_k {', '.join(map(str, widths))}, up to {max(verify_s)} nodes. Choose "
                f"among these, or decode without --adaptive."
            )
        plain_s = 1.0 / profile.plain_tokens_per_s
        verify_s = {1: plain_s, **verify_s}
        return cls(plain_s=plain_s, verify_s=verify_s, draft_s=measured, overhead_s=float(profile.costs["overhead_s"]))

    # -- one round, in this order --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A round that drafts nothing, until one of the following says otherwise."""
        self._levels, self._nodes, self._promise, self._promised = 0, 0, 0.0, 0.0

    def without_drafting(self, scores: Tensor) -> int:
        """How many nodes of a chain that took no time, with these scores (C,), to verify instead of drafting."""
        if self._free_credit <= 0 or not len(scores):
            return 0
        rates = self._rates(np.cumsum(scores.exp().tolist()))
        worth = (1 + DOUBT) / self.plain_s
        if self._credit > 0:
            worth = max(worth, self._rate)
        best = int(rates.argmax())
        self._nodes = best + 1 if rates[best] > worth else 0
        return self._nodes

    def drafts(self) -> bool:
        """Is there credit for a round of drafting?"""
        self._levels = int(self._credit > 0)
        return self._credit > 0

    def deeper(self, beam_scores: Tensor) -> bool:
        """After a level whose best nodes have these scores (k,): is another one worth its time?"""
        promise = float(beam_scores.exp().sum())
        if self._promise and promise:
            self._continues = MEMORY * self._continues + (1 - MEMORY) * min(promise / self._promise, 1.0)
        self._promise = promise
        added = self._trust * promise * self._continues
        seconds = self._draft[self._levels + 1] - self._draft[self._levels]
        worth = added > self._rate * seconds
        self._levels += int(worth)
        return bool(worth)

    def num_nodes(self, scores: Tensor, at_most: int) -> int:
        """How many of the candidates with these scores (C,) to verify, the best first."""
        best = np.sort(scores.float().exp().cpu().numpy())[::-1][:at_most]
        promised = np.cumsum(best)
        chosen = int(self._rates(self._trust * promised).argmax()) + 1
        self._promised, self._nodes = float(promised[chosen - 1]), chosen
        return chosen

    def record(self, emitted: int) -> None:
        """The round brought so many tokens."""
        seconds = self._verify[1 + self._nodes] + (self._spent() if self._nodes else 0.0)
        charged = seconds * (1 + DOUBT) if self._nodes else seconds
        earned, most = emitted * self.plain_s * (1 + ALLOWANCE) - charged, MOST_CREDIT * self.plain_s
        if self._levels or not self._nodes:
            self._credit = min(self._credit + earned, most)
        if not self._levels:
            self._free_credit = min(self._free_credit + earned, most)
        if self._levels:
            trust = (emitted - 1) / max(self._promised, 1e-6)
            self._trust = MEMORY * self._trust + (1 - MEMORY) * min(trust, 2.0)
            self._rate = max(MEMORY * self._rate + (1 - MEMORY) * emitted / seconds, 1.0 / self.plain_s)

    def _rates(self, promised: np.ndarray) -> np.ndarray:
        """Tokens per second of 1, 2, .. verified nodes that bring so many tokens (C,) together."""
        seconds = self._verify[2 : 2 + len(promised)] + self._spent()
        return (1.0 + promised[: len(seconds)]) / seconds

    def _spent(self) -> float:
        """Seconds of a round, verification excluded."""
        return self._draft[self._levels] + self._overhead


class TreeChoice:
    """A tree for every answer, where rounds of fixed shapes cannot change: of the few given the one that promises most
    tokens per second, or None for plain decoding. What rounds cost is known, what they bring is learned."""

    def __init__(self, plain_s: float, round_s: Mapping[TreeShape, float], shares: Mapping[TreeShape, float]) -> None:
        """Seconds of rounds; `shares`: the tokens beyond one that a tree brings, of those that the largest does."""
        self._plain_s, self._round_s, self._shares = plain_s, dict(round_s), shares
        self._gain, self._plain_answers = FIRST_GAIN, 0
        self._current: TreeShape | None = None

    def next_tree(self) -> TreeShape | None:
        """For the answer that begins now."""
        rates = {tree: (1 + share * self._gain) / self._round_s[tree] for tree, share in self._shares.items()}
        best = max(rates, key=lambda tree: rates[tree])
        pays = rates[best] > (1 + ALLOWANCE) / self._plain_s
        self._plain_answers = 0 if pays or self._plain_answers == RETRY else self._plain_answers + 1
        self._current = best if self._plain_answers == 0 else None
        return self._current

    def record(self, emitted: int) -> None:
        """A round of this answer brought so many tokens."""
        if self._current is not None:
            gain = (emitted - 1) / self._shares[self._current]
            self._gain = LONG_MEMORY * self._gain + (1 - LONG_MEMORY) * gain


def decides_rounds(budget: Any) -> bool:
    """Whether the host decides in every round, which then has no fixed shape."""
    return budget is not None and not isinstance(budget, TreeChoice)
