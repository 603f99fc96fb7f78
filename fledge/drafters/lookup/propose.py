"""Prompt lookup: the longest n-gram at the end of the text that occurred before proposes what followed it then.

No weights, and it works with every target. Known from transformers (`prompt_lookup_num_tokens`) and vLLM (method
`ngram`); here it is the floor that a trained drafter must beat. Of several earlier places the latest is taken.

    .. the cat sat on the mat . the cat |         n-gram "the cat" -> proposes "sat on the mat"
    .. one two one two |                          n-gram "one two" -> proposes "one two one two .."

Its drafts take no time, so a budget asks for them before it asks another drafter (`fledge.decoding.adaptive`), as
SuffixDecoding does beside a draft model (Oliaro et al. 2024, arXiv 2411.04975). How often they are right depends on how
long the n-gram is, and on the text: that is learned from every round, whatever was verified.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fledge.drafters.base import Budget, DrafterFiles, Emitted
from fledge.drafters.tree import Trees, TreeShape, chains, roots_only

LONGEST, SHORTEST = 5, 1  # tokens of an n-gram, tried from the longest
USUAL = (0.2, 0.5, 0.65, 0.7, 0.85)  # chance by the length of the n-gram, before any is learned: SmolLM2-135M at T = 0
MEMORY = 0.95  # weight of the past in a chance, per draft
LEAST = 1e-3  # a chance

NAME = "lookup"  # what --draft says: there is no folder to name


class PromptLookup:
    """The drafter without weights. What it has learned of texts holds for the next one."""

    needs_host = True
    takes_no_time = True
    tap_layers = None
    devices: frozenset[torch.device] = frozenset()

    def __init__(self) -> None:
        self.chances = Chances()


def read_lookup(name: str) -> DrafterFiles | None:
    """Prompt lookup, where --draft names it."""
    return DrafterFiles(None, False, lambda target: PromptLookup()) if name == NAME else None


class LookupProposer:
    """Proposes chains from the tokens of each sequence itself."""

    needs_taps = False

    def __init__(self, drafter: PromptLookup, shape: TreeShape, batch: int, capacity: int = 0) -> None:
        self.num_levels = self.num_drafted = self.rows_ahead = shape.levels
        self._histories: list[History] = [History([]) for _ in range(batch)]
        self._found = [NOTHING] * batch  # proposed to each sequence in the round before
        self._chances = drafter.chances

    def reserve(self, capacity: int) -> None:
        """Nothing is cached by rows."""

    def move(self, source: int, goal: int) -> None:
        self._histories[goal], self._found[goal] = self._histories[source], self._found[source]

    def fill(self, slot: int, token_ids: Tensor, taps: Tensor | None, positions: Tensor) -> None:
        self._histories[slot], self._found[slot] = History(token_ids.tolist()), NOTHING

    def follow(self, emitted: Emitted, num_keys: int) -> None:
        rows = zip(self._histories, emitted.token_ids.tolist(), emitted.num_new.tolist(), strict=False)
        for slot, (history, tokens, count) in enumerate(rows):
            self._chances.learn(self._found[slot], tokens[:count])
            self._found[slot] = NOTHING
            history.extend(tokens[:count])

    def propose(self, emitted: Emitted, num_levels: int, num_keys: int, budget: Budget | None = None) -> Trees:
        """Chains of `num_levels` tokens; a sequence in which nothing recurs gets one of no meaning."""
        batch, device = len(emitted.lengths), emitted.token_ids.device
        self._found[:batch] = [history.continuation(num_levels) for history in self._histories[:batch]]
        if not any(one.tokens for one in self._found[:batch]):
            return roots_only(emitted.roots)
        drafts = [one.tokens or [0] * num_levels for one in self._found[:batch]]
        unlikely = [-math.inf] * num_levels
        scores = [[0.0, *(self._chances.along(one) or unlikely)] for one in self._found[:batch]]
        tokens = torch.cat((emitted.roots, torch.tensor(drafts, device=device)), dim=1)
        return replace(chains(tokens), scores=torch.tensor(scores, device=device))


@dataclass(frozen=True)
class Continuation:
    """What followed an n-gram of this length."""

    tokens: list[int]
    size: int


NOTHING = Continuation([], 0)


class Chances:
    """The chance that a token follows an n-gram again, by the length of the n-gram."""

    def __init__(self) -> None:
        self._by_size = list(USUAL)

    def along(self, found: Continuation) -> list[float]:
        """Log of the chance that all tokens up to each are right. A right one makes the n-gram of the next longer."""
        scores, score = [], 0.0
        for step in range(len(found.tokens)):
            score += math.log(self._by_size[self._place(found, step)])
            scores.append(score)
        return scores

    def learn(self, found: Continuation, text: Sequence[int]) -> None:
        """What the text brought where this was found."""
        for step, (token, expected) in enumerate(zip(text, found.tokens, strict=False)):
            place = self._place(found, step)
            right = token == expected
            self._by_size[place] = max(MEMORY * self._by_size[place] + (1 - MEMORY) * right, LEAST)
            if not right:
                break

    def _place(self, found: Continuation, step: int) -> int:
        return min(found.size + step, LONGEST) - SHORTEST


class History:
    """The tokens of one sequence and the latest place of every n-gram in them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed its latest occurrence
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; every n-gram is noted once something follows it."""
        for token in tokens:
            end = len(self._tokens)
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def continuation(self, at_most: int) -> Continuation:
        """What followed the longest recurring n-gram at the end, from the beginning again where the text ends before so
        many tokens; nothing where none recurs."""
        end = len(self._tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._after.get(tuple(self._tokens[end - size :]))
            if start is not None:
                return Continuation([self._tokens[start + step % (end - start)] for step in range(at_most)], size)
        return NOTHING
