"""Prompt lookup: the longest n-gram at the end of the text that occurred before proposes what followed it then.

No weights, and it works with every target. Known from transformers (`prompt_lookup_num_tokens`) and vLLM (method
`ngram`); here it is the floor that a trained drafter must beat. Of several earlier places the latest is taken.

    .. the cat sat on the mat . the cat |         n-gram "the cat" -> proposes "sat on the mat"
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.drafters.base import Budget, DrafterFiles, Emitted
from fledge.drafters.tree import Trees, TreeShape, chains, roots_only

LONGEST, SHORTEST = 5, 1  # tokens of an n-gram, tried from the longest


NAME = "lookup"  # what --draft says: there is no folder to name


@dataclass(frozen=True)
class PromptLookup:
    """The drafter without weights."""

    needs_host = True
    tap_layers = None
    devices: frozenset[torch.device] = frozenset()


def read_lookup(name: str) -> DrafterFiles | None:
    """Prompt lookup, where --draft names it."""
    return DrafterFiles(None, False, lambda target: PromptLookup()) if name == NAME else None


class LookupProposer:
    """Proposes chains from the tokens of each sequence itself."""

    needs_taps = False

    def __init__(self, drafter: PromptLookup, shape: TreeShape, batch: int, capacity: int = 0) -> None:
        self.num_levels = self.num_drafted = self.rows_ahead = shape.levels
        self._histories: list[History] = [History([]) for _ in range(batch)]

    def reserve(self, capacity: int) -> None:
        """Nothing is cached by rows."""

    def move(self, source: int, goal: int) -> None:
        self._histories[goal] = self._histories[source]

    def fill(self, slot: int, token_ids: Tensor, taps: Tensor | None, positions: Tensor) -> None:
        self._histories[slot] = History(token_ids.tolist())

    def follow(self, emitted: Emitted, num_keys: int) -> None:
        pairs = zip(self._histories, emitted.token_ids.tolist(), emitted.num_new.tolist(), strict=False)
        for history, tokens, count in pairs:
            history.extend(tokens[:count])

    def propose(self, emitted: Emitted, num_levels: int, num_keys: int, budget: Budget | None = None) -> Trees:
        """Chains as long as the longest found; a sequence with a shorter one is filled up with its last token."""
        found = [history.continuation(num_levels) for history in self._histories[: len(emitted.lengths)]]
        longest = max(map(len, found))
        if longest == 0:
            return roots_only(emitted.roots)
        drafts = [tokens + [tokens[-1] if tokens else 0] * (longest - len(tokens)) for tokens in found]
        drafted = torch.tensor(drafts, device=emitted.token_ids.device)
        return chains(torch.cat((emitted.roots, drafted), dim=1))


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

    def continuation(self, at_most: int) -> list[int]:
        """What followed the longest recurring n-gram at the end; empty where none recurs."""
        end = len(self._tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._after.get(tuple(self._tokens[end - size :]))
            if start is not None:
                return self._tokens[start : start + at_most]
        return []
