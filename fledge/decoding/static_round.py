"""One round for several sequences at once, in three parts whose shapes never change: draft, verify, accept.

Everything a round reads and writes lies in tensors that stay where they are, so that the parts can be captured into
CUDA graphs and replayed; the host is told nothing but `State.news`. A sequence that is done (stop token, no room) goes
on being computed on the same state and emits nothing. Knows the target, the head and the tree. Knows nothing of clocks
or graphs.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fledge.decoding.accept import choose
from fledge.decoding.attention import can_replace, decoding_attention
from fledge.decoding.cache import layout_of
from fledge.decoding.masks import Masks, kinds_of
from fledge.decoding.records import Sampling, TreeShape
from fledge.decoding.static_cache import BatchCache
from fledge.decoding.static_drafting import BatchDrafter
from fledge.decoding.static_tree import accepted_paths, roots_only
from fledge.draft.model import DraftModel
from fledge.target.model import Target

# B sequences, N tree nodes, E slots: the most tokens of a round, A tapped layers, H hidden size, V vocabulary

Part = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class State:
    """What one round hands to the next, per sequence. Written in place."""

    lengths: Tensor  # (B,) committed rows of the target's cache; the root stands behind them
    tokens: Tensor  # (B, E) emitted by the last round; the first num_new count, the last of them is the root
    num_new: Tensor  # (B,)
    taps: Tensor  # (B, E, A, H) of the tokens before them; A = 0 without a head
    room: Tensor  # (B,) tokens that may still be emitted
    done: Tensor  # (B,) bool
    news: Tensor  # (B, 1 + E) for the host: how many tokens this round emitted, and the tokens

    def set(self, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def copy(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name).clone() for field in dataclasses.fields(self)}


class Round:
    """The three parts for one target, head, tree, sampling and number of sequences."""

    def __init__(
        self, target: Target, draft: DraftModel | None, shape: TreeShape, batch: int, capacity: int, sampling: Sampling
    ) -> None:
        device, config = target.device, target.text_config
        self._target = weakref.ref(target)
        self.sampling, self.batch, self.capacity = sampling, batch, capacity
        self.drafter = BatchDrafter(draft, shape, batch, capacity) if draft is not None and shape.levels else None
        self.num_nodes = 1 + self.drafter.num_drafted if self.drafter else 1
        self.num_slots = 1 + self.drafter.num_levels if self.drafter else 1
        self.cache = BatchCache(layout_of(target), target.num_layers, batch, capacity)
        self.masks = Masks(
            kinds_of(config, target.name), target.dtype, device,
            causal_by_default=can_replace(target.model, config),
        )  # fmt: skip
        self.stops = torch.zeros(target.vocab_size, dtype=torch.bool, device=device)
        self.generator = torch.Generator(device) if sampling.temperature else None
        self._last_position = (getattr(config, "max_position_embeddings", None) or capacity) - 1
        self._rotaries = [module for module in target.model.modules() if _is_dynamic(getattr(module, "rope_type", ""))]
        num_taps = len(target.tap_layers) if self.drafter else 0

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(batch, *size, dtype=dtype, device=device)

        self.state = State(
            lengths=zeros(), tokens=zeros(self.num_slots), num_new=zeros() + 1,
            taps=zeros(self.num_slots, num_taps, target.hidden_size, dtype=target.dtype),
            room=zeros(), done=zeros(dtype=torch.bool), news=zeros(1 + self.num_slots),
        )  # fmt: skip
        self._trees = roots_only(self.state.tokens[:, :1])
        self._logits = self._seen_taps = self.state.taps

    @property
    def target(self) -> Target:
        target = self._target()
        assert target is not None
        return target

    @property
    def rows_ahead(self) -> int:
        """Cache rows behind the committed ones that a round may touch."""
        return max(self.num_nodes, self.num_slots, self.drafter.beam_rows if self.drafter else 0)

    def parts(self, bucket: int) -> dict[str, Part]:
        """In this order. No sequence may have more than `bucket` - `rows_ahead` committed rows."""
        return {
            "draft": lambda: self.draft_trees(bucket), "verify": lambda: self.verify(bucket), "accept": self.accept,
        }  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        """The target as rounds need it: our attention, and ropes that do not look at the positions."""
        with torch.inference_mode(), decoding_attention(self.target.model, self.target.text_config):
            before = [module.rope_type for module in self._rotaries]
            for module in self._rotaries:
                module.rope_type = _frozen(module.rope_type)
            try:
                yield
            finally:
                for module, rope_type in zip(self._rotaries, before, strict=True):
                    module.rope_type = rope_type

    # -- the parts -----------------------------------------------------------------------------------------------------

    def draft_trees(self, bucket: int) -> None:
        state = self.state
        if self.drafter is None:
            self._trees = roots_only(state.tokens[:, :1])
            return
        features = self.drafter.draft.fuse(state.taps)
        self._trees = self.drafter.grow(state.lengths, state.tokens, state.num_new, features, bucket)

    def verify(self, bucket: int) -> None:
        """The target on all nodes. Positions past its last one belong to nodes that cannot be emitted."""
        trees, lengths = self._trees, self.state.lengths
        self.cache.open_behind(lengths, self.num_nodes, bucket)
        output = self.target.forward(
            trees.token_ids,
            position_ids=(lengths[:, None] + trees.levels).clamp(max=self._last_position),
            attention_mask=self.masks.trees(lengths, trees.levels, trees.ancestors, bucket),
            past_key_values=self.cache,
            taps=self.drafter is not None,
        )
        self._logits = self.target.head(output.last_hidden)
        if output.tap_hidden is not None:
            self._seen_taps = output.tap_hidden

    def accept(self) -> None:
        """The longest accepted path of each sequence, cut at stop tokens and at its room."""
        state, trees = self.state, self._trees
        chosen = choose(self._logits.flatten(0, 1), self.sampling, self.generator).view_as(trees.token_ids)
        path, num_accepted = accepted_paths(trees, chosen, self.num_slots)
        self.cache.compact(state.lengths, path)
        tokens = chosen.gather(1, path)
        emitted, done = self._cut(tokens, num_accepted)
        goes_on = ~done
        state.set(
            news=torch.cat((emitted[:, None], tokens), dim=1),
            room=state.room - emitted,
            lengths=state.lengths + num_accepted * goes_on,
            tokens=torch.where(goes_on[:, None], tokens, state.tokens),
            num_new=torch.where(goes_on, num_accepted, state.num_new),
            done=done,
        )
        if self.drafter is not None:
            taps = self._seen_taps.gather(1, path[..., None, None].expand(-1, -1, *self._seen_taps.shape[2:]))
            state.set(taps=torch.where(goes_on[:, None, None, None], taps, state.taps))

    def _cut(self, tokens: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the tokens (B, E) are emitted (B,), and which sequences are done after them (B,)."""
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        stops = self.stops[tokens]
        after_a_stop = stops.cumsum(dim=1) > stops.long()
        fits = slots < torch.minimum(num_accepted, self.state.room)[:, None]
        kept = fits & ~after_a_stop & ~self.state.done[:, None]
        emitted = kept.sum(dim=1)
        return emitted, self.state.done | (stops & kept).any(dim=1) | (emitted >= self.state.room)

    def forget(self) -> None:
        """A state as after prompts of one token: something to rehearse with."""
        one = torch.ones_like(self.state.lengths)
        self.state.set(lengths=one, num_new=one, tokens=torch.zeros_like(self.state.tokens), done=one < 0)

    # -- the beginning -------------------------------------------------------------------------------------------------

    def begin(self, prompts: list[Tensor], room: Tensor, stops: Tensor) -> None:
        """Prompts (P,) one after the other, each with its first token; `room` (B,) is what each may emit."""
        assert len(prompts) == self.batch, f"{len(prompts)=} {self.batch=}"
        with torch.inference_mode(), decoding_attention(self.target.model, self.target.text_config):
            self._begin(prompts, room, stops)

    def _begin(self, prompts: list[Tensor], room: Tensor, stops: Tensor) -> None:
        state, taps = self.state, self.drafter is not None
        self.stops.zero_()[stops] = True
        last_rows, last_taps = [], []
        for sequence, prompt in enumerate(prompts):
            self.cache.open_sequence(sequence, len(prompt))
            positions = torch.arange(len(prompt), device=prompt.device)
            output = self.target.forward(
                prompt[None], position_ids=positions[None], attention_mask=self.masks.causal(len(prompt)),
                past_key_values=self.cache, taps=taps,
            )  # fmt: skip
            last_rows.append(output.last_hidden[0, -1])
            if self.drafter is not None and output.tap_hidden is not None:
                last_taps.append(output.tap_hidden[0, -1])
                features = self.drafter.draft.fuse(output.tap_hidden[0, :-1])
                self.drafter.fill(sequence, prompt[1:], features)
        first = choose(self.target.head(torch.stack(last_rows)), self.sampling, self.generator)
        emitted = torch.ones_like(state.num_new)
        state.tokens[:, 0] = first
        state.news[:, :2] = torch.stack((emitted, first), dim=1)
        state.set(
            lengths=torch.tensor([len(prompt) for prompt in prompts], device=first.device),
            num_new=emitted, room=room - 1, done=self.stops[first] | (room <= 1),
        )  # fmt: skip
        if last_taps:
            state.taps[:, 0] = torch.stack(last_taps)


def _is_dynamic(rope_type: object) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any("dynamic" in str(name) for name in types)


def _frozen(rope_type: object) -> object:
    """The library looks at every batch's largest position where a rope is 'dynamic' and waits for the device to do so.
    Frequencies change past max_position_embeddings only, where nothing is decoded."""
    if isinstance(rope_type, dict):
        return {layer_type: _frozen(name) for layer_type, name in rope_type.items()}
    return "default" if "dynamic" in str(rope_type) else rope_type
