"""The target's side of a round: prefill, verify a tree behind the cached prefix, keep the accepted rows.

Knows the target, its cache and its masks. Knows nothing of drafts, acceptance or sampling. One `Verifier` per target is
kept between generations, so its cache is allocated once and grows when a longer generation asks for it.

Rows and rope positions are two things. Masks and windows count rows. Rope positions are rows too, until a prompt has
pictures and the target a multimodal rope: a picture of 100 tokens then takes some ten positions, and all text behind it
is `rope_delta` off (a negative number).
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fledge.decoding.attention import can_replace, decoding_attention, stock_attention
from fledge.decoding.cache import TargetCache, layout_of
from fledge.decoding.chains import ChainVerifier, keeps_running_state
from fledge.decoding.masks import Masks, kinds_of
from fledge.decoding.tree import Tree
from fledge.target.model import Target
from fledge.target.record import TargetOutput

# P prompt tokens, N tree nodes, R axes of a multimodal rope

CAPACITY_STEP = 256

_verifiers: "weakref.WeakKeyDictionary[Target, Verifier | ChainVerifier]" = weakref.WeakKeyDictionary()


def verifier_of(target: Target) -> "Verifier | ChainVerifier":
    """The target's verifier; the first call asks the model for the shapes it caches."""
    if target not in _verifiers:
        _verifiers[target] = ChainVerifier(target) if keeps_running_state(target) else Verifier(target)
    return _verifiers[target]


class Verifier:
    """Runs the target over prompts and trees."""

    chains_only = False

    def __init__(self, target: Target) -> None:
        self._target = weakref.ref(target)
        self._layout = layout_of(target)
        self._cache: TargetCache | None = None
        self.rope_delta = 0
        self._masks = Masks(
            kinds_of(target.text_config, target.name), target.dtype, target.device,
            causal_by_default=can_replace(target.model, target.text_config),
        )  # fmt: skip

    @property
    def target(self) -> Target:
        target = self._target()
        assert target is not None
        return target

    @property
    def cache(self) -> TargetCache:
        assert self._cache is not None, "outside a session"
        return self._cache

    @contextmanager
    def session(self, num_rows: int) -> Iterator[None]:
        """One generation of at most `num_rows` cached rows."""
        if self._cache is None or self._cache.capacity < num_rows:
            capacity = -(-num_rows // CAPACITY_STEP) * CAPACITY_STEP
            self._cache = None  # free the old one first
            self._cache = TargetCache(self._layout, self.target.num_layers, capacity)
        self._cache.length = self.rope_delta = 0
        with decoding_attention(self.target.model, self.target.text_config):
            yield

    def prefill(
        self, prompt_ids: Tensor, *, taps: bool, positions: Tensor | None = None,
        model_inputs: Mapping[str, Tensor] | None = None,
    ) -> TargetOutput:  # fmt: skip
        """All prompt tokens (P,); their rows are committed. Shapes (1, P, ..).

        `positions` (P,) or (R, P) where they are not simply the rows. With pictures (`model_inputs`) the target makes
        the mask: in some, the tokens of a picture see each other in both directions.
        """
        num_rows = prompt_ids.shape[0]
        self.cache.open(num_rows)
        if positions is None:
            positions = torch.arange(num_rows, device=prompt_ids.device)
        else:
            self.rope_delta = int(positions[..., -1].max()) + 1 - num_rows
        if model_inputs:
            with stock_attention(self.target.text_config):
                output = self._forward(prompt_ids, positions, None, taps, model_inputs)
        else:
            output = self._forward(prompt_ids, positions, self._masks.causal(num_rows), taps)
        self.cache.length = num_rows
        return output

    def verify(self, tree: Tree, num_levels: int, *, taps: bool) -> TargetOutput:
        """All nodes of the tree (N,) behind the committed rows; the rows stay open until `keep`. Shapes (1, N, ..)."""
        prefix_len = self.cache.length
        self.cache.open(len(tree))
        positions, last = tree.levels + prefix_len, prefix_len + num_levels
        mask = self._masks.tree(prefix_len, positions, tree.ancestors, last)
        return self._forward(tree.token_ids, positions + self.rope_delta, mask, taps)

    def keep(self, rows: list[int]) -> None:
        """Commit the accepted rows of the tree just verified."""
        self.cache.keep(rows)

    def _forward(
        self, token_ids: Tensor, positions: Tensor, mask: object, taps: bool,
        model_inputs: Mapping[str, Tensor] | None = None,
    ) -> TargetOutput:  # fmt: skip
        beside: dict[str, Any] = dict(model_inputs or {})
        return self.target.forward(
            token_ids[None], position_ids=positions[..., None, :], attention_mask=mask, past_key_values=self.cache,
            taps=taps, **beside,
        )  # fmt: skip
