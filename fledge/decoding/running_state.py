"""The target's side of a round over the library's own cache: chains only.

For layers that keep a running state (linear attention, state spaces), and for targets whose attention our cache and
masks do not fit (`probe.py`). A running state is one per sequence: it can follow a chain of drafts, not a tree, and
cannot give tokens back. So it is copied before a round. When only a part of the chain is kept, the copy is put back and
the kept tokens wait: the next round reads them again in front of its own chain, in one forward.

    state holds | waiting | chain            kept: x y
    a b c       |         | x y z       ->   state again at a b c, waiting x y
    a b c       | x y     | u v         ->   all kept: state at a b c x y u v, nothing waits

Waiting tokens cost rows; past `MOST_WAITING` they get a forward of their own. Every sequence has a state of its own and
is read by itself. Knows the target and the library's cache.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fledge.decoding.accept import Accepted
from fledge.decoding.verifier import Lengths, ModelInputs
from fledge.drafters.tree import Trees
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.record import TargetOutput

MOST_WAITING = 16


def keeps_running_state(target: Target) -> bool:
    """Does the library give some layer of this target a running state?"""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _new_cache(target).layers)


def _new_cache(target: Target) -> Any:
    return DynamicCache(config=target.text_config)


class RunningStateVerifier:
    """`Verifier` for such targets: the same methods, trees of one branch."""

    chains_only = True
    one_by_one = True

    def __init__(self, target: Target, batch: int) -> None:
        self._target = weakref.ref(target)
        try:
            one_token = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
            target.forward(one_token, past_key_values=_new_cache(target), taps=False)
        except ValueError as error:
            raise UserError(
                f"{target.name}: its layers keep a running state in a cache of their own kind, which fledge cannot "
                f"roll back ({error})."
            ) from None
        self._states: list[RunningState | None] = [None] * batch

    @property
    def target(self) -> Target:
        target = self._target()
        assert target is not None
        return target

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def reserve(self, capacity: int) -> None:
        """The library's cache grows by itself."""

    def move(self, source: int, goal: int) -> None:
        self._states[goal], self._states[source] = self._states[source], None

    def prefill(
        self, slots: slice, prompts: Tensor, *, taps: bool, positions: Tensor | None = None,
        model_inputs: ModelInputs | None = None,
    ) -> TargetOutput:  # fmt: skip
        assert len(prompts) == 1, "prompts of running states are read one by one"
        state = self._states[slots.start] = RunningState(_new_cache(self.target))
        return state.read(self.target, prompts[0], taps, positions, model_inputs)

    def verify(self, trees: Trees, lengths: Lengths, num_keys: int, *, taps: bool) -> TargetOutput:
        nodes = torch.arange(trees.num_nodes, device=trees.parents.device)
        assert (trees.parents == (nodes - 1).clamp_min(0)).all(), "a tree of several branches"
        outputs = [self._state(slot).verify(self.target, chain, taps) for slot, chain in enumerate(trees.token_ids)]
        tapped = [output.tap_hidden for output in outputs if output.tap_hidden is not None]
        return TargetOutput(
            torch.cat([output.last_hidden for output in outputs]), torch.cat(tapped) if tapped else None
        )

    def head(self, last_hidden: Tensor) -> Tensor:
        return self.target.head(last_hidden)

    def keep(self, lengths: Lengths, accepted: Accepted) -> None:
        for slot, count in enumerate(accepted.num_accepted.tolist()):
            self._state(slot).keep(count)

    def _state(self, slot: int) -> "RunningState":
        state = self._states[slot]
        assert state is not None, f"{slot=} holds no sequence"
        return state


class RunningState:
    """The state of one sequence, and the tokens that wait to enter it."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._length = 0  # tokens the state holds
        self._offset = 0  # rope position minus row: pictures of many tokens take few positions
        self._waiting: list[int] = []
        self._chain: list[int] = []  # of the round under way
        self._before: list[dict[str, Any]] = []

    def read(
        self, target: Target, token_ids: Tensor, taps: bool, positions: Tensor | None = None,
        model_inputs: ModelInputs | None = None,
    ) -> TargetOutput:  # fmt: skip
        """Tokens (S,) enter the state for good; `positions` (S,) or (R, S) where they are not simply the rows."""
        output = self._forward(target, token_ids, taps, positions, model_inputs)
        self._length += len(token_ids)
        if positions is not None:
            self._offset = int(positions[..., -1].max()) + 1 - self._length
        return output

    def verify(self, target: Target, chain: Tensor, taps: bool) -> TargetOutput:
        """A chain (N,) behind what the state holds and the tokens that wait. Shapes (1, N, ..)."""
        if len(self._waiting) > MOST_WAITING:
            self.read(target, torch.tensor(self._waiting, device=chain.device), taps=False)
            self._waiting = []
        self._chain = chain.tolist()
        if len(self._chain) > 1:
            self._before = self._copied()
        first = len(self._waiting)
        output = self._forward(target, torch.tensor([*self._waiting, *self._chain], device=chain.device), taps)
        tapped = None if output.tap_hidden is None else output.tap_hidden[:, first:]
        return TargetOutput(output.last_hidden[:, first:], tapped)

    def keep(self, count: int) -> None:
        """Commit the accepted beginning of the chain."""
        if count == len(self._chain):
            self._length += len(self._waiting) + count
            self._waiting = []
        else:
            self._put_back(self._before)
            self._waiting += self._chain[:count]
        self._chain = []

    def _forward(
        self, target: Target, token_ids: Tensor, taps: bool, positions: Tensor | None = None,
        model_inputs: ModelInputs | None = None,
    ) -> TargetOutput:  # fmt: skip
        if positions is None:
            first = self._length + self._offset
            positions = torch.arange(first, first + len(token_ids), device=token_ids.device)
        beside: dict[str, Any] = dict(model_inputs or {})
        return target.forward(
            token_ids[None], position_ids=positions[..., None, :], past_key_values=self._cache, taps=taps, **beside
        )

    def _copied(self) -> list[dict[str, Any]]:
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
