"""Decoder layers of stock models as two operations and their attention, where fledge decodes or extracts.

Of a step of SmolLM2 (bf16, two cores) the products take 10 ms, and 14 ms went to the beginnings of eight hundred small
operations and to the Python between them. Here a layer is two calls of `native.c`, or of `gpu.py`'s few kernels, with
its attention function and the cache between them:

    norm | q k v | norm and rope of q, of k;   o | norm | add, norm | gate up | silu or gelu, times | down | norm | add

A layer that may be built like Llama's, Gemma's, Hunyuan's or Granite's has these parts under these names, some of them
none. Whether it computes what they make together is asked of it: on random states, the stock layer and ours must give
the cache, the attention function and the next layer the same numbers. What the layer hands to its attention function
beside them (a window, a soft cap, sinks) is noted then and handed on. On a CPU, layers whose products are not those of
`multiply.c`, and everywhere others and gradients take the stock forward, the slow twin in the tests.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fledge.target import card, gpu, gpu_exact, gpu_products, native
from fledge.target.norms import eps_of, rms_norms
from fledge.target.products import Product, accelerate, is_independent, loop_of

# B sequences, S rows, R = B S, H hidden size, h query heads, g key heads, d head_dim

CACHE_NAMES = ("cache", "past_key_values")  # of transformers since 5.20 and before
OWN_ARGUMENTS = {"attention_mask", "position_embeddings", *CACHE_NAMES}  # not for the attention function to know
NOTED = "fledge_noted"
TRIED = ((1, 1), (2, 3))  # B, S
HEAD_NORMS = ("query_norm", "key_norm")
SCALE = 0.05  # of the states that are tried: what a layer adds is not lost beside them
FIRST_POSITION = 1 << 20  # far enough that a factor which grows with the position shows
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest number: rounding


class NoSuchLayer(Exception):
    """A layer that is not built like Llama's."""


class FusedLayer:
    """The `forward` of a decoder layer."""

    def __init__(self, layer: Any, norms: Mapping[nn.Module, bool]) -> None:
        """`norms`: modules known to be RMS norms, with whether they scale by 1 + weight. Raises NoSuchLayer."""
        self.layer, self.turns = layer, Turns()
        self.attention, self.mlp = attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        self.norms = _norms_of(layer, attention)
        used = [norm for norm in self.norms.values() if norm is not None]
        kinds = {(norms.get(norm), eps_of(norm)) for norm in used}
        if len(kinds) > 1 or not all(norm in norms for norm in used):
            raise NoSuchLayer
        self.one_more, self.eps = kinds.pop() if kinds else (False, 0.0)
        qkv = _together(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        mix, gates = _together(attention, ("o_proj",)), _together(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
        down = _together(mlp, ("down_proj",))
        activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
        self.activation = _activation(activation)
        if qkv is None or mix is None:
            raise NoSuchLayer
        self.products = {"qkv": qkv, "mix": mix}
        hidden, inner = qkv.layers[0].in_features, down.layers[0].in_features if down else 0
        if gates and down and self.activation and not inner % native.LANES:
            if gates.shape != (2 * inner, hidden) or down.shape != (hidden, inner):
                raise NoSuchLayer
            self.products |= {"gate_up": gates, "down": down}
        self.size = size = int(getattr(attention, "head_dim", 0))
        heads, outputs = mix.shape[1] // max(size, 1), qkv.shape[0]
        groups = (outputs // max(size, 1) - heads) // 2
        if not 0 < size <= native.MOST_SIZE or size % 2 or (heads + 2 * groups) * size != outputs:
            raise NoSuchLayer
        self.shape = {"hidden": hidden, "heads": heads, "groups": groups, "size": size}
        self.dtype, self.device = qkv.layers[0].weight.dtype, qkv.layers[0].weight.device
        self.on_gpu = card.runs_on(self.device)
        sizes = {name: size if name in HEAD_NORMS else hidden for name in self.norms}
        weights = [(_weight(norm), sizes[name]) for name, norm in self.norms.items() if norm is not None]
        # what is read by pointers must be as large and of the kind that it is taken for
        if mix.shape != (hidden, heads * size) or any(w.dtype is not self.dtype or len(w) != n for w, n in weights):
            raise NoSuchLayer
        self._kept: list[Tensor] = []
        self._layer: Any = None
        self._paths: gpu_exact.Paths | None = None  # on a GPU: of rows whose bits do not depend on each other
        self.constants: dict[str, Any] = {}  # what the attention function is given that the layer is not
        layers = [one for product in self.products.values() for one in product.layers]
        self._bypassed = [attention, *layers, *used, *([mlp, activation] if self.fuses_mlp else [])]

    @property
    def operations(self) -> Any:
        """The module that has them; not kept, for a copy of a model could not have it."""
        return gpu if self.on_gpu else native

    @property
    def fuses_mlp(self) -> bool:
        return "down" in self.products

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        turns: Any = kwargs.get("position_embeddings")
        if args or torch.is_grad_enabled() or not self._suits(hidden_states, turns):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        batch, rows, hidden = shape = hidden_states.shape
        states = hidden_states.reshape(-1, hidden).contiguous()
        its_turns, place = self.turns.of(turns, batch, rows), self.attention.layer_idx
        exact: dict[str, Any] = {} if self._paths is None else {"exact": True}
        goal = cache.goal(place) if self.on_gpu and isinstance(cache, HasGoals) else None
        if isinstance(cache, HasGoals) and goal is not None:
            query, *_ = gpu.before_attention(self.facts, states, *its_turns, batch, rows, goal, **exact)
            key, value = cache.rows_read(place)
        else:
            query, key, value = self.operations.before_attention(self.facts, states, *its_turns, batch, rows, **exact)
            if cache is not None:
                key, value = cache.update(key, value, place)
        given = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        if self._paths is not None:
            given["paths"] = self._paths
        attend = ALL_ATTENTION_FUNCTIONS[self.attention.config._attn_implementation]
        mixed, _ = attend(self.attention, query, key, value, kwargs.get("attention_mask"), **self.constants, **given)
        mixed = mixed.reshape(len(states), -1).contiguous()
        out, normed = self.operations.behind_attention(self.facts, states, mixed, **exact)
        if self.fuses_mlp:
            return out.view(shape)
        return out.view(shape) + self.mlp(normed.view(shape))

    def _suits(self, states: Tensor, turns: Any) -> bool:
        """Rows of the layer's dtype, turned whole."""
        if type(states) is not Tensor or states.dim() != 3 or not isinstance(turns, tuple) or len(turns) != 2:
            return False
        cos, sin = turns
        return (
            states.numel() > 0 and states.device == cos.device == self.device
            and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[-1] == self.size
            and states.dtype is cos.dtype is sin.dtype is self.dtype
        )  # fmt: skip

    def is_ready(self) -> bool:
        """Nobody listens inside the layer, and its attention is one of the library's functions. Weights are looked at
        again."""
        if any(part._forward_hooks or part._forward_pre_hooks for part in self._bypassed):
            return False
        self._layer = None
        return self.attention.config._attn_implementation in ALL_ATTENTION_FUNCTIONS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None, "_kept": [], "_paths": None}  # pointers are not for copies

    @property
    def facts(self) -> Any:
        """The layer as the operations read it, made anew when it is entered."""
        if self._layer is None:
            self._layer = self._facts()
        return self._layer

    def _facts(self) -> Any:
        facts = self.operations.Layer(**self.shape, eps=self.eps, one_more=self.one_more)
        parts = {name: None if norm is None else _weight(norm) for name, norm in self.norms.items()}
        for name, product in self.products.items():
            parts[name], parts[f"{name}_bias"] = product.parts()
        self._kept = [part for part in parts.values() if part is not None]
        for name, part in parts.items():
            given = part if self.on_gpu or part is None else part.data_ptr()
            setattr(facts, name, given)
        facts.inner = self.products["down"].layers[0].in_features if self.fuses_mlp else 0
        facts.gelu = self.activation == "gelu"
        facts.turned_first = hasattr(self.attention, "query_layernorm")
        facts.residual = float(getattr(self.layer, "residual_multiplier", 1.0))
        return facts


class Turns:
    """The rotations of a forward, which all its layers share, as `native.before_attention` reads them."""

    def __init__(self) -> None:
        self._last: tuple[Any, tuple[Tensor, Tensor]] | None = None  # given, and made of it; threads swap it whole

    def of(self, given: tuple[Tensor, Tensor], batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, d), contiguous, from those of one sequence or of all."""
        last = self._last
        if last is None or given is not last[0] or last[1][0].shape[:2] != (batch, rows):
            cos, sin = (one.expand(batch, rows, -1).contiguous() for one in given)
            last = self._last = (given, (cos, sin))
        return last[1]


@runtime_checkable
class HasGoals(Protocol):
    """A cache that can say where the next rows go."""

    def goal(self, layer: int) -> "gpu.Goal | None": ...

    def rows_read(self, layer: int) -> tuple[Tensor, Tensor]: ...


@torch.inference_mode()
def fused_layers(model: Any, layers: Iterable[Any]) -> list[FusedLayer]:
    """The decoder layers of a model that can be computed so; none where the operations cannot be compiled."""
    device = next(model.parameters()).device
    if not card.runs_on(device) and (device.type != "cpu" or native.library() is None):
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


def fuse(target: Any) -> None:
    """Compute a target's layers so from now on; its weights must not change."""
    accelerate(target.model)
    for one in fused_layers(target.model, target.layers):
        if one.is_ready():
            vars(one.layer)["forward"] = one


def sums_alone(model: Any, layers: Sequence[FusedLayer], num_layers: int) -> bool:
    """Whether a row has its bits in any company: all products are the loop's, or can be `linear_exact` on a GPU."""
    head = model.get_output_embeddings()
    whole = len(layers) == num_layers and all(layer.fuses_mlp for layer in layers)
    if not whole or head is None:
        return False
    return gpu_products.joined_of(head) is not None if layers[0].on_gpu else is_independent(head)


@contextmanager
def exact_rows(layers: Sequence[FusedLayer], paths: "gpu_exact.Paths | None") -> Iterator[None]:
    """Inside the block the rows of these layers are the nodes of trees, and have the same bits alone."""
    for one in layers:
        one._paths = paths
    try:
        yield
    finally:
        for one in layers:
            one._paths = None


@contextmanager
def fused(layers: Sequence[FusedLayer]) -> Iterator[None]:
    """Inside the block these layers compute so. Their weights must not change there."""
    ready = [one for one in layers if one.is_ready()]
    for one in ready:
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


def _norms_of(layer: Any, attention: Any) -> dict[str, nn.Module | None]:
    """The norms by their names in `native.Layer`. The norm that is called post-attention is the MLP's in Llama's layer
    and the attention's in one that has norms on both sides of its MLP."""
    named = {name: getattr(layer, name, None) for name in (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )}  # fmt: skip
    first, second, third, last = named.values()
    around = third is not None or last is not None
    mixed_norm, mlp_norm = (second, third) if around else (None, second)
    heads = [getattr(attention, f"{name}_norm", getattr(attention, f"{long}_layernorm", None))
             for name, long in (("q", "query"), ("k", "key"))]  # fmt: skip
    found = {"in_norm": first, "query_norm": heads[0], "key_norm": heads[1]}
    return found | {"mixed_norm": mixed_norm, "mlp_norm": mlp_norm, "out_norm": last}


def _together(module: Any, names: Sequence[str], joint: str = "") -> "Product | gpu_products.Joined | None":
    """The product by `multiply.c` or on a GPU that these layers are, or the one layer that has them all."""
    layers: list[Any] = [getattr(module, name, None) for name in names]
    layers = [getattr(module, joint, None)] if None in layers else layers
    return None if None in layers else together(*layers)


def together(*layers: nn.Module) -> "Product | gpu_products.Joined | None":
    """The product that these layers are, in this order and no others."""
    return loop_of(*layers) or gpu_products.joined_of(*layers)


def _activation(function: Any) -> str | None:
    """Which of those that `native.c` knows this is."""
    numbers = torch.linspace(-9, 9, 64)
    if not isinstance(function, nn.Module):
        return None
    if torch.allclose(function(numbers), F.silu(numbers)):
        return "silu"
    return "gelu" if torch.allclose(function(numbers), F.gelu(numbers, approximate="tanh"), atol=1e-6) else None


def _weight(norm: Any) -> Tensor:
    return norm.weight.detach()


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
    generator, dtype = torch.Generator().manual_seed(0), one.dtype
    states = SCALE * torch.randn(batch, rows, one.shape["hidden"], generator=generator)
    angles = torch.randn(batch, rows, one.size // 2, generator=generator).repeat(1, 1, 2)
    parameters = inspect.signature(type(one.layer).forward).parameters
    arguments = {
        "attention_mask": None,
        "position_ids": (FIRST_POSITION + torch.arange(rows)).expand(batch, -1),
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "use_cache": True,
        next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0]): _Notes(),
    }
    moved = {name: _moved(value, one.device) for name, value in arguments.items()}
    return states.to(dtype).to(one.device), moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


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
