"""The target's side of a round: read prompts, verify trees behind the cached prefixes, keep the accepted rows.

Two kinds behind one interface: `AttentionVerifier` for targets whose layers cache keys and values, and, in
`running_state.py`, one for targets with layers that keep a running state, which can follow chains but no trees. Knows
the target, its cache and its masks. Knows nothing of drafts, acceptance or sampling.

Rows and rope positions are two things. Masks and windows count rows. Rope positions are rows too, until a prompt has
pictures and the target a multimodal rope: a picture of 100 tokens then takes some ten positions, and all text behind it
is off by an `offset` (a negative number).
"""

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.decoding.accept import Accepted
from fledge.decoding.attention import can_replace, decoding_attention, row_attention, stock_attention
from fledge.decoding.cache import TargetCache, layout_of
from fledge.decoding.masks import Masks, kinds_of
from fledge.drafters.tree import Trees, filled_up
from fledge.target import card, native
from fledge.target.fused import exact_rows, fused, fused_layers, sums_alone
from fledge.target.gpu_exact import Paths
from fledge.target.gpu_products import linear_exact
from fledge.target.model import Target
from fledge.target.norms import as_one_kernel, rms_norms
from fledge.target.record import TargetOutput
from fledge.target.ropes import one_operation, usual_ropes

# B sequences, P prompt tokens, N tree nodes, R axes of a multimodal rope, E slots of a path

ModelInputs = Mapping[str, Tensor]
ROWS = 4  # products of fewer rows sum in another order


@dataclass(frozen=True)
class Lengths:
    """How many rows the sequences of a round have committed: on the device, and on the host where it knows them."""

    device: Tensor  # (B,)
    host: tuple[int, ...] | None = None

    @property
    def equal(self) -> int | None:
        """The length of all sequences, where the host knows that they agree."""
        return self.host[0] if self.host is not None and len(set(self.host)) == 1 else None


class Verifier(Protocol):
    """What a round asks of a target. Sequences lie in slots 0 .. B-1."""

    chains_only: bool  # trees must not branch
    one_by_one: bool  # prompts are read one by one

    def running(self) -> Any:
        """A context in which everything below is called."""
        ...

    def prefill(
        self, slots: slice, prompts: Tensor, *, taps: bool, positions: Tensor | None = None,
        model_inputs: ModelInputs | None = None,
    ) -> TargetOutput:  # fmt: skip
        """Prompts (b, P) enter these slots; shorter ones are filled up behind their end. Shapes (b, P, ..)."""
        ...

    def verify(self, trees: Trees, lengths: Lengths, num_keys: int, *, taps: bool) -> TargetOutput:
        """All nodes of the trees (B, N). Shapes (B, N, ..)."""
        ...

    def head(self, last_hidden: Tensor) -> Tensor:
        """The target's logits of rows (.., H) of these."""
        ...

    def keep(self, lengths: Lengths, accepted: Accepted) -> None:
        """Commit the accepted nodes of the trees just verified."""
        ...

    def reserve(self, capacity: int) -> None:
        """Room for sequences of so many rows."""
        ...

    def move(self, source: int, goal: int) -> None:
        """The sequence of slot `source` goes on in slot `goal`, whose own has ended."""
        ...


class AttentionVerifier:
    """Runs a target with a key-value cache over prompts and trees, `batch` sequences at once."""

    chains_only = False

    def __init__(self, target: Target, batch: int, capacity: int, *, exact: bool = False) -> None:
        """`exact`: the logits of a node are the same bits whatever is computed beside it (`exact.py`)."""
        config = target.text_config
        self._layers = fused_layers(target.model, target.layers)
        self._exact = exact
        alone = exact and sums_alone(target.model, self._layers, target.num_layers)
        self._fills = exact and not alone
        self._on_card = alone and card.runs_on(target.device)
        # a prompt is other bits beside another one, and filling shorter ones up costs time on a CPU
        self.one_by_one = exact or target.device.type == "cpu"
        self._target = weakref.ref(target)
        self.cache = TargetCache(layout_of(target), target.num_layers, batch, self._with_filling(capacity))
        self._offsets = torch.zeros(batch, dtype=torch.int64, device=target.device)  # rope position minus row
        self._last_position = (getattr(config, "max_position_embeddings", None) or 1 << 62) - 1
        self._masks = Masks(
            kinds_of(config, target.name), target.dtype, target.device,
            causal_by_default=can_replace(target.model, config),
        )  # fmt: skip
        self._ropes = [module for module in target.model.modules() if _is_dynamic(getattr(module, "rope_type", ""))]
        self._norms, self._rotations = rms_norms(target.model), usual_ropes(target.model)
        self._runs = False

    @property
    def target(self) -> Target:
        target = self._target()
        assert target is not None
        return target

    @contextmanager
    def running(self) -> Iterator[None]:
        """Our attention function, layers, norms and rotations of few operations, and ropes that do not look at the
        positions.

        The library looks at every batch's largest position where a rope is 'dynamic', and waits for the device to do
        so. Frequencies change past max_position_embeddings only, where nothing is decoded. Entered again, nothing.
        """
        if self._runs:
            yield
            return
        before = [module.rope_type for module in self._ropes]
        attention = decoding_attention(self.target.model, self.target.text_config)
        most_rows = sys.maxsize if self._exact else native.MOST_ROWS
        norms, layers = as_one_kernel(self._norms, most_rows), fused(self._layers)
        with torch.inference_mode(), attention, norms, one_operation(self._rotations), layers:
            for module in self._ropes:
                module.rope_type = _frozen(module.rope_type)
            self._runs = True
            try:
                yield
            finally:
                self._runs = False
                for module, rope_type in zip(self._ropes, before, strict=True):
                    module.rope_type = rope_type

    def _with_filling(self, capacity: int) -> int:
        """Cache rows for sequences of so many."""
        return capacity + ROWS if self._fills else capacity

    def reserve(self, capacity: int) -> None:
        self.cache.reserve(self._with_filling(capacity))

    def move(self, source: int, goal: int) -> None:
        self.cache.move(source, goal)
        self._offsets[goal] = self._offsets[source]

    def prefill(
        self, slots: slice, prompts: Tensor, *, taps: bool, positions: Tensor | None = None,
        model_inputs: ModelInputs | None = None,
    ) -> TargetOutput:  # fmt: skip
        """See `Verifier`. `positions` (P,) or (R, P) of a single prompt, where they are not simply the rows. With
        pictures (`model_inputs`) the target makes the mask: in some, the tokens of a picture see each other."""
        num_rows = prompts.shape[1]
        self.cache.open_block(slots, 0, num_rows)
        self._offsets[slots] = 0
        if positions is None:
            positions = torch.arange(num_rows, device=prompts.device).expand_as(prompts)
        else:
            self._offsets[slots] = positions[..., -1].max() + 1 - num_rows
            positions = positions[..., None, :]
        if not model_inputs:
            return self._forward(prompts, positions, self._masks.causal(num_rows), taps)
        with stock_attention(self.target.text_config):
            return self._forward(prompts, positions, None, taps, model_inputs)

    def verify(self, trees: Trees, lengths: Lengths, num_keys: int, *, taps: bool) -> TargetOutput:
        """See `Verifier`. Positions past the target's last one belong to nodes that cannot be emitted."""
        asked = trees.num_nodes
        if self._fills:
            trees = self._filled(trees)
        num_keys += trees.num_nodes - asked
        batch, num_nodes = trees.token_ids.shape
        whole = lengths.equal is not None and lengths.equal + num_nodes == num_keys
        if whole:
            self.cache.open_block(slice(0, batch), num_keys - num_nodes, num_nodes)
        else:
            self.cache.open_rows(lengths.device, num_nodes, num_keys)
        mask = self._masks.trees(lengths.device, trees, num_keys, whole=whole)
        first = lengths.device + self._offsets[:batch]
        positions = (first[:, None] + trees.levels).clamp(max=self._last_position)
        if not self._exact:
            return self._forward(trees.token_ids, positions, mask, taps)
        paths = Paths.of(lengths.device, trees.levels, trees.ancestors) if self._on_card else None
        with row_attention(self.target.text_config), exact_rows(self._layers, paths):
            return self._forward(trees.token_ids, positions, mask, taps).first(asked)

    def _filled(self, trees: Trees) -> Trees:
        """Products of fewer than ROWS rows sum in another order; in fp32 those of any number that is no multiple. Not
        those of `multiply.c`."""
        batch, num_nodes = trees.token_ids.shape
        if self.target.dtype is torch.float32:
            return filled_up(trees, ROWS)
        return filled_up(trees, -(-ROWS // batch)) if batch * num_nodes < ROWS else trees

    def head(self, last_hidden: Tensor) -> Tensor:
        """See `Verifier`."""
        rows = last_hidden.flatten(0, -2)
        if self._on_card:
            head: Any = self.target.model.get_output_embeddings()
            logits = linear_exact(rows, head.weight, head.bias).view(*last_hidden.shape[:-1], -1)
            return self.target.quirks.apply(logits)
        if not self._fills:
            return self.target.head(last_hidden)
        missing = -len(rows) % ROWS if self.target.dtype is torch.float32 or len(rows) < ROWS else 0
        if not missing:
            return self.target.head(last_hidden)
        logits = self.target.head(F.pad(rows, (0, 0, 0, missing)))[: len(rows)]
        return logits.view(*last_hidden.shape[:-1], -1)

    def keep(self, lengths: Lengths, accepted: Accepted) -> None:
        """Compaction is skipped where the host sees that every path already lies where it belongs."""
        if lengths.host is not None:
            slots = torch.arange(accepted.path.shape[1], device=accepted.path.device)
            inside = slots < accepted.num_accepted[:, None]
            if not ((accepted.path != slots) & inside).any():
                return
        self.cache.compact(lengths.device, accepted.path)

    def _forward(
        self, token_ids: Tensor, positions: Tensor, mask: object, taps: bool, model_inputs: ModelInputs | None = None
    ) -> TargetOutput:
        beside: dict[str, Any] = dict(model_inputs or {})
        return self.target.forward(
            token_ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, taps=taps, **beside
        )


def _is_dynamic(rope_type: object) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any("dynamic" in str(name) for name in types)


def _frozen(rope_type: object) -> object:
    if isinstance(rope_type, dict):
        return {layer_type: _frozen(name) for layer_type, name in rope_type.items()}
    return "default" if "dynamic" in str(rope_type) else rope_type
