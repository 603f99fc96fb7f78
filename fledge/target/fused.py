"""Decoder layers of stock models as few large operations, while a CPU decodes.

Of a step of SmolLM2 (bf16, two cores) the products take 16 ms, and 14 ms went to the beginnings of eight hundred small
operations and to the Python between them. Here a layer is its four products (`products.py`), its attention function and
six calls of `native.c`:

    norm | q k v | norm and rope of q, of k | cache, attention | o | add, norm | gate up | silu, times | down | add

A layer that may be built like Llama's has these parts under these names. Whether it computes what they make together is
asked of it: on random states, the stock layer and ours must give the cache, the attention function and the next layer
the same numbers. What the layer hands to its attention function beside them (a window, a soft cap, sinks) is noted then
and handed on. Other layers, prompts and gradients take the stock forward, the slow twin in the tests.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fledge.target import native
from fledge.target.norms import rms_norms
from fledge.target.products import MOST_ROWS, product_of

# B sequences, S rows, R = B S, H hidden size, h query heads, g key heads, d head_dim

CACHE_NAMES = ("cache", "past_key_values")  # of transformers since 5.20 and before
OWN_ARGUMENTS = {"attention_mask", "position_embeddings", *CACHE_NAMES}  # not for the attention function to know
NOTED = "fledge_noted"
TRIED = ((1, 1), (2, 3))  # B, S
SCALE = 0.05  # of the states that are tried: what a layer adds is not lost beside them
FIRST_POSITION = 1 << 20  # far enough that a factor which grows with the position shows
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number: rounding


class NoSuchLayer(Exception):
    """A layer that is not built like Llama's."""


class FusedLayer:
    """The `forward` of a decoder layer."""

    def __init__(self, layer: Any, norms: Sequence[nn.Module], most_rows: int = native.MOST_ROWS) -> None:
        """`norms`: modules known to be RMS norms. Raises NoSuchLayer."""
        self.layer, self.most_rows = layer, most_rows
        self.turns = Turns()
        self.attention = attention = _part(layer, "self_attn")
        self.mlp = mlp = _part(layer, "mlp")
        projections = [_part(attention, f"{name}_proj") for name in "qkvo"]
        gates: list[Any] = [getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")]
        self.qkv, self.output = product_of(*projections[:3]), product_of(projections[3])
        self.gate_up, self.down = (product_of(*gates[:2]), product_of(gates[2])) if None not in gates else (None, None)
        if not _is_silu(getattr(mlp, "act_fn", None)):
            self.gate_up = None
        outer = [_part(layer, name) for name in ("input_layernorm", "post_attention_layernorm")]
        inner = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        if self.qkv is None or self.output is None or any(one not in norms for one in [*outer, *inner] if one):
            raise NoSuchLayer
        self.norms = [_numbers(one) for one in outer]
        self.head_norms = [(None, 0.0) if one is None else _numbers(one) for one in inner]
        self.size: int = getattr(attention, "head_dim", 0)
        others = [weight for weight, _ in self.head_norms if weight is not None and len(weight) != self.size]
        if not 0 < self.size <= native.MOST_SIZE or self.size % 2 or others:  # what `native.heads` could not hold
            raise NoSuchLayer
        sizes = [projection.out_features for projection in projections[:3]]
        self.starts, self.num_heads = (0, sizes[0], sum(sizes[:2])), [size // self.size for size in sizes]
        self.constants: dict[str, Any] = {}  # what the attention function is given that the layer is not
        fused_mlp = [mlp, mlp.act_fn, *gates] if self.fuses_mlp else []
        self._bypassed = [one for one in [attention, *projections, *outer, *inner, *fused_mlp] if one is not None]

    @property
    def fuses_mlp(self) -> bool:
        return self.gate_up is not None and self.down is not None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        turns = kwargs.get("position_embeddings")
        if args or cache is None or torch.is_grad_enabled() or not self._suits(hidden_states, turns):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        shape = hidden_states.shape
        states = hidden_states.reshape(-1, shape[-1]).contiguous()
        added = self._attended(states, shape[:2], cache, turns, kwargs)
        num_rows, norm = len(states), self.norms[1]
        if self.gate_up is None or self.down is None:
            states, normed = native.norm_rows(states, added, *norm, num_rows)
            return states.view(shape) + self.mlp(normed.view(shape))
        states, normed = native.norm_rows(states, added, *norm, self.gate_up.filled(num_rows))
        inner = native.gated(self.gate_up.of_filled(normed), num_rows, self.down.filled(num_rows))
        return (states + self.down.of_filled(inner)[:num_rows]).view(shape)

    def _attended(
        self, states: Tensor, shape: Sequence[int], cache: Any, turns: Any, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """What the attention adds to states (R, H) of a layer of `shape` (B, S)."""
        assert self.qkv is not None and self.output is not None
        (batch, rows), size, num_rows = shape, self.size, len(states)
        cos, sin = self.turns.of(turns, batch, rows)
        _, normed = native.norm_rows(states, None, *self.norms[0], self.qkv.filled(num_rows))
        product = self.qkv.of_filled(normed)
        query, key = (
            native.heads(product, self.starts[part], (batch, self.num_heads[part], rows, size), cos, sin, *norm)
            for part, norm in enumerate(self.head_norms)
        )
        value = product[:num_rows, self.starts[2] :].view(batch, rows, -1, size).transpose(1, 2)
        key, value = cache.update(key, value, self.attention.layer_idx)
        given = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        attend = ALL_ATTENTION_FUNCTIONS[self.attention.config._attn_implementation]
        mixed, _ = attend(self.attention, query, key, value, kwargs.get("attention_mask"), **self.constants, **given)
        mixed = native.filled_up(mixed.reshape(num_rows, -1), self.output.filled(num_rows))
        return self.output.of_filled(mixed)

    def _suits(self, states: Tensor, turns: Any) -> bool:
        """Few rows of the layer's dtype, turned whole."""
        if type(states) is not Tensor or states.dim() != 3 or not isinstance(turns, tuple) or len(turns) != 2:
            return False
        (cos, sin), weight = turns, self.norms[0][0]
        return (
            0 < states.shape[0] * states.shape[1] <= self.most_rows and states.is_cpu
            and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[-1] == self.size
            and states.dtype is cos.dtype is sin.dtype is weight.dtype
        )  # fmt: skip

    def is_ready(self) -> bool:
        """Nobody listens inside the layer, and its attention is one of the library's functions. Packs new weights."""
        if any(part._forward_hooks or part._forward_pre_hooks for part in self._bypassed):
            return False
        for product in (self.qkv, self.output, self.gate_up, self.down):
            if product is not None:
                product.pack()
        return self.attention.config._attn_implementation in ALL_ATTENTION_FUNCTIONS


class Turns:
    """The rotations of a forward, which all its layers share, as `native.heads` reads them."""

    def __init__(self) -> None:
        self._given: Any = None
        self._turns: tuple[Tensor, Tensor] | None = None

    def of(self, given: tuple[Tensor, Tensor], batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, d), contiguous, from those of one sequence or of all."""
        if self._turns is None or given is not self._given or self._turns[0].shape[:2] != (batch, rows):
            cos, sin = (one.expand(batch, rows, -1).contiguous() for one in given)
            self._given, self._turns = given, (cos, sin)
        return self._turns


@torch.inference_mode()
def fused_layers(model: Any, layers: Iterable[Any]) -> list[FusedLayer]:
    """The decoder layers of a model that can be computed so; none where the operations are not compiled."""
    if next(model.parameters()).device.type != "cpu" or native.library() is None:
        return []
    if not getattr(model, "_supports_attention_backend", False):
        return []
    norms, found, turns = rms_norms(model), [], Turns()
    for layer in layers:
        try:
            fused = FusedLayer(layer, norms)
        except NoSuchLayer:
            continue
        if _agree(fused):
            fused.turns = turns
            found.append(fused)
    return found


@contextmanager
def fused(layers: Sequence[FusedLayer], most_rows: int = native.MOST_ROWS) -> Iterator[None]:
    """Inside the block these layers compute so, for so many rows. Their weights must not change there."""
    ready = [one for one in layers if one.is_ready()]
    for one in ready:
        one.most_rows = min(most_rows, MOST_ROWS)
        vars(one.layer)["forward"] = one
    try:
        yield
    finally:
        for one in ready:
            del vars(one.layer)["forward"]


def _part(module: Any, name: str) -> Any:
    part = getattr(module, name, None)
    if not isinstance(part, nn.Module):
        raise NoSuchLayer
    return part


def _is_silu(activation: Any) -> bool:
    numbers = torch.linspace(-9, 9, 64)
    return isinstance(activation, nn.Module) and torch.allclose(activation(numbers), F.silu(numbers))


def _numbers(norm: Any) -> tuple[Tensor, float]:
    """Weight and eps of a norm."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return norm.weight.detach().contiguous(), float(eps or 0.0)


# -- is it the same? ---------------------------------------------------------------------------------------------------


def _agree(one: FusedLayer) -> bool:
    """Whether the stock forward and ours give the same; notes the constants of the attention function on the way."""
    stock, constants = type(one.layer).forward, []
    for batch, rows in TRIED:
        states, arguments = _trial(one, batch, rows)
        try:
            expected, noted = _parts(lambda *a, **k: stock(one.layer, *a, **k), one, states, arguments)
            constants.append({name: value for name, value in noted.items() if name not in arguments})
            one.constants = constants[0]
            found, given = _parts(one, one, states, arguments)
        except Exception:  # it wants other arguments, or gives other results: the stock forward stays
            return False
        if not _same_values(noted, given) or not all(map(_close, found, expected)):
            return False
    return _same_values(*constants)


def _trial(one: FusedLayer, batch: int, rows: int) -> tuple[Tensor, dict[str, Any]]:
    """States (B, S, H) as a model hands them to its layers, and what comes with them."""
    generator, weight = torch.Generator().manual_seed(0), one.norms[0][0]
    states = SCALE * torch.randn(batch, rows, len(weight), generator=generator)
    angles = torch.randn(batch, rows, one.size // 2, generator=generator).repeat(1, 1, 2)
    parameters = inspect.signature(type(one.layer).forward).parameters
    arguments = {
        "attention_mask": None,
        "position_ids": (FIRST_POSITION + torch.arange(rows)).expand(batch, -1),
        "position_embeddings": (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)),
        "use_cache": True,
        next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0]): _Notes(),
    }
    return states.to(weight.dtype), arguments


class _Notes:
    """A cache that notes what it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.parts += [key, value]
        return key, value


def _parts(
    forward: Callable[..., Any], one: FusedLayer, states: Tensor, arguments: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors that a forward gives away, and the keyword arguments of its attention function."""
    parts: list[Tensor] = []
    noted: list[dict[str, Any]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        parts.extend((query, key, value))
        noted.append(kwargs)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).contiguous(), None

    config = one.attention.config
    before, config._attn_implementation = config._attn_implementation, NOTED
    ALL_ATTENTION_FUNCTIONS[NOTED] = attend
    cache = _Notes()
    named = {name: cache if isinstance(value, _Notes) else value for name, value in arguments.items()}
    try:
        output = forward(states, **named)
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NOTED]
    (kwargs,) = noted
    return [*parts, *cache.parts, output - states], kwargs


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    error, largest = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    return bool(error <= TOLERANCE[expected.dtype] * largest)


def _same_values(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return some.keys() == others.keys() and all(
        value is others[name] or (not isinstance(value, Tensor) and value == others[name])
        for name, value in some.items()
    )
