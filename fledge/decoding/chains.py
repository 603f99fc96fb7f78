"""The target's side of a round where layers keep a running state (linear attention, state spaces): chains only.

A running state is one per sequence: it can follow a chain of drafts, not a tree, and cannot give tokens back. So it is
copied before a round. When only a part of the chain is kept, the copy is put back and the kept tokens wait: the next
round reads them again in front of its own chain, in one forward.

    state holds | waiting | chain            kept: x y
    a b c       |         | x y z       ->   state again at a b c, waiting x y
    a b c       | x y     | u v         ->   all kept: state at a b c x y u v, nothing waits

Waiting tokens cost rows; past `MOST_WAITING` they get a forward of their own. Knows the target and the library's cache.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fledge.decoding.tree import Tree
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.record import TargetOutput

MOST_WAITING = 16


def keeps_running_state(target: Target) -> bool:
    """Does the library give some layer of this target a running state?"""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _new_cache(target).layers)


def _new_cache(target: Target) -> Any:
    return DynamicCache(config=target.text_config)


class ChainVerifier:
    """`Verifier` for such targets: the same methods, trees of one branch."""

    chains_only = True

    def __init__(self, target: Target) -> None:
        self._target = weakref.ref(target)
        try:
            one_token = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
            target.forward(one_token, past_key_values=_new_cache(target), taps=False)
        except ValueError as error:
            raise UserError(
                f"{target.name}: its layers keep a running state in a cache of their own kind, which fledge cannot "
                f"roll back ({error}). It can be trained for, not decoded here."
            ) from None
        self._cache: Any = None
        self._waiting: list[int] = []
        self._chain: list[int] = []  # of the round under way
        self._before: list[dict[str, Any]] = []
        self._length = 0  # tokens the state holds

    @property
    def target(self) -> Target:
        target = self._target()
        assert target is not None
        return target

    @contextmanager
    def session(self, num_rows: int) -> Iterator[None]:
        """One generation; the library's cache grows by itself."""
        self._cache, self._waiting, self._chain, self._length = _new_cache(self.target), [], [], 0
        try:
            yield
        finally:
            self._cache, self._before = None, []

    def prefill(
        self, prompt_ids: Tensor, *, taps: bool, positions: Tensor | None = None,
        model_inputs: Mapping[str, Tensor] | None = None,
    ) -> TargetOutput:  # fmt: skip
        """All prompt tokens (P,). Shapes (1, P, ..)."""
        if positions is not None or model_inputs:
            raise UserError(
                f"{self.target.name}: pictures in the prompt are not supported for targets whose layers keep a running "
                f"state. Ask with text alone."
            )
        output = self._forward(prompt_ids, taps)
        self._length = len(prompt_ids)
        return output

    def verify(self, tree: Tree, num_levels: int, *, taps: bool) -> TargetOutput:
        """All nodes of a chain (N,). Shapes (1, N, ..)."""
        assert len(tree) == 1 or tree.parents.tolist() == [0, *range(len(tree) - 1)], "a tree of several branches"
        device = tree.token_ids.device
        if len(self._waiting) > MOST_WAITING:
            self._forward(torch.tensor(self._waiting, device=device), taps=False)
            self._length += len(self._waiting)
            self._waiting = []
        self._chain = tree.token_ids.tolist()
        if len(self._chain) > 1:
            self._before = self._copy_state()
        token_ids = torch.tensor([*self._waiting, *self._chain], device=device)
        output = self._forward(token_ids, taps)
        first = len(self._waiting)
        tapped = None if output.tap_hidden is None else output.tap_hidden[:, first:]
        return TargetOutput(output.last_hidden[:, first:], tapped)

    def keep(self, rows: list[int]) -> None:
        """Commit the accepted beginning of the chain."""
        if len(rows) == len(self._chain):
            self._length += len(self._waiting) + len(self._chain)
            self._waiting = []
        else:
            self._put_back(self._before)
            self._waiting += self._chain[: len(rows)]
        self._chain = []

    # -- the running state ---------------------------------------------------------------------------------------------

    def _forward(self, token_ids: Tensor, taps: bool) -> TargetOutput:
        position_ids = torch.arange(self._length, self._length + len(token_ids), device=token_ids.device)
        return self.target.forward(
            token_ids[None], position_ids=position_ids[None], past_key_values=self._cache, taps=taps
        )

    def _copy_state(self) -> list[dict[str, Any]]:
        """What a forward will change: running states are copied, keys and values are never written in place."""
        copies = []
        for layer in self._cache.layers:
            saved = dict(vars(layer))
            for name, value in saved.items():
                if isinstance(value, dict):  # states by index, and flags
                    saved[name] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
            copies.append(saved)
        return copies

    def _put_back(self, copies: list[dict[str, Any]]) -> None:
        for layer, saved in zip(self._cache.layers, copies, strict=True):
            vars(layer).clear()
            vars(layer).update(saved)
