"""A decoder layer's operations on a GPU as few kernels: `native.py` there.

Of a captured step of Qwen3-8B on an H100 (9.5 ms, torch 2.11) the products took 6.2 ms, attention 1.2 ms at 640 keys
and some 12 at 8,200 (a few thread blocks for all keys of a head), and some thirty small operations a layer the rest.
Here projections of the same input are one product of joined weights, what stands between products is one kernel each,
and attention splits the keys. Kernels are Triton's (`kernels.py`), which PyTorch brings along for CUDA on Linux;
without it, for other devices and for odd shapes, PyTorch does it, the slow twin.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.console import warn
from fledge.outputs import cached

# B sequences, S rows, R = B S, H hidden size, h query heads, g key heads, d head_dim, K keys, I inner size

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # of a card whose matrix units know bf16
MOST_HEAD = 256
MOST_ROWS = 128  # of a sequence; with more, PyTorch's kernels have enough to do
PROGRAMS = 264  # of attention, two for each of an H100's multiprocessors
KEYS = 64  # the least that a program of attention takes
MOST_PARTS = 128
CUTS = ((64, 2), (32, 2), (32, 1), (16, 1))  # keys at a time and how many times they are kept, the fastest first
GATES = 1024  # numbers of a program


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels; None where there is no Triton or no card for it, or where Triton cannot compile."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return None
    try:
        from fledge.target import kernels
    except ImportError:
        return None
    try:
        _try(kernels)
    except Exception as error:  # no C compiler for what starts its kernels, a card that it does not know, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(
            f"Triton compiles no kernels here ({reason}): PyTorch's are used, which decode at two thirds of the speed."
        )
        return None
    return kernels


def _try(found: ModuleType) -> None:
    """Compile and run one of the kernels."""
    states = torch.ones(2, 16, device="cuda")
    out = torch.empty_like(states)
    found.rms_norm[2,](states, states[0], out, 16, 16, 16, 1e-6, ONE_MORE=False, BLOCK=16, num_warps=1)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: on the current card."""
    return device.type == "cuda" and kernels() is not None and device.index == torch.cuda.current_device()


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: plain numbers on a card, without gradient."""
    plain = all(type(one.data) is Tensor and one.dtype in DTYPES for one in tensors)
    return plain and not torch.is_grad_enabled() and all(runs_on(one.device) for one in tensors)


# -- joined products ---------------------------------------------------------------------------------------------------


class Joined:
    """One product for linear layers of the same input: their weights lie behind each other in one tensor."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs of all layers, inputs."""
        return sum(layer.out_features for layer in self.layers), self.layers[0].in_features

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """The joint weight and bias. The layers' own become views of them, so nothing is kept twice."""
        names = ("weight",) if self.layers[0].bias is None else ("weight", "bias")
        weight, *bias = (_joined([getattr(layer, name) for layer in self.layers]) for name in names)
        return weight, bias[0] if bias else None


def joined_of(*layers: nn.Module) -> Joined | None:
    """The product that these layers are; None where they are no plain linear layers of one kind on a card."""
    linear: list[nn.Linear] = [layer for layer in layers if type(layer) is nn.Linear and "forward" not in vars(layer)]
    if len(linear) < len(layers):
        return None
    alike = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in linear}
    with torch.no_grad():
        return Joined(linear) if len(alike) == 1 and fits(*(one.weight for one in linear)) else None


@torch.inference_mode(False)
@torch.no_grad()
def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """All of these (C, ..) as one tensor. Where they do not lie so yet, they are moved; they can still be trained."""
    tensors = [part.data for part in parts]
    end, behind = tensors[0].data_ptr(), True
    for one in tensors:
        behind = behind and one.is_contiguous() and one.data_ptr() == end
        end += one.nbytes
    one_storage = len({one.untyped_storage().data_ptr() for one in tensors}) == 1
    shape = (sum(len(one) for one in tensors), *tensors[0].shape[1:])
    if behind and one_storage:
        return tensors[0].as_strided(shape, tensors[0].stride())
    joint = torch.cat(tensors)
    for part, view in zip(parts, joint.split([len(one) for one in tensors]), strict=True):
        part.data = view
    return joint


# -- products of few rows by a weight ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductShape:
    """How a product is cut."""

    outputs: int  # of a program
    inputs: int  # at a time
    warps: int
    stages: int


SHAPES = {  # by the most rows that they are for
    1: (ProductShape(4, 1024, 4, 3), ProductShape(2, 2048, 4, 3)),
    16: (ProductShape(64, 256, 4, 4), ProductShape(64, 128, 4, 5)),
    64: (ProductShape(64, 128, 4, 4), ProductShape(64, 64, 4, 6), ProductShape(128, 64, 8, 5)),
}
TIMED_BYTES = 160 << 20  # of weights that are read in turn: more than a card's cache holds
MOST_TIMED = 64  # such weights; a model of so small ones is in the cache while it decodes, too


class BestShape(msgspec.Struct, frozen=True):
    """What was measured to be best for one product, kept in the user's cache folder."""

    shape: int | None  # which of SHAPES; None: PyTorch's


_best: dict[tuple[Any, ...], BestShape] = {}


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(states (R, X), weight (C, X), bias (C,)); few rows by whatever was measured to be fastest here."""
    most = next((most for most in SHAPES if len(states) <= most), None)
    suits = weight.dtype in (torch.bfloat16, torch.float16) and states.dtype is weight.dtype and weight.is_contiguous()
    if most is None or not suits or not states.is_contiguous() or not fits(states, weight):
        return F.linear(states, weight, bias)
    key = (most, *weight.shape, weight.dtype, bias is None, weight.device.index)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return F.linear(states, weight, bias)
        facts = (SHAPES, torch.cuda.get_device_name(), torch.__version__, _found().triton.__version__, *key[:-1])
        try:
            _best[key] = cached("products", repr(facts), BestShape, lambda: _fastest(most, weight, bias))
        except torch.OutOfMemoryError:
            _best[key] = BestShape(None)
    number = _best[key].shape
    return F.linear(states, weight, bias) if number is None else multiply(states, weight, bias, SHAPES[most][number])


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None, shape: ProductShape) -> Tensor:
    """states (R, X) by weight (C, X), plus bias (C,): (R, C)."""
    (rows, inputs), outputs = states.shape, len(weight)
    out = states.new_empty(rows, outputs)
    more: dict[str, Any] = {"HAS_BIAS": bias is not None, "BLOCK_C": shape.outputs, "BLOCK_X": shape.inputs}
    more |= {"num_warps": shape.warps, "num_stages": shape.stages}
    grid = (-(-outputs // shape.outputs),)
    if rows == 1:
        _found().multiply_row[grid](states, weight, bias, out, outputs, inputs, **more)
    else:
        block = max(16, _power(rows))
        _found().multiply_rows[grid](states, weight, bias, out, rows, outputs, inputs, BLOCK_R=block, **more)
    return out


def _fastest(most: int, weight: Tensor, bias: Tensor | None) -> BestShape:
    """Times PyTorch's product and ours, over weights that the cache does not hold."""
    states = torch.randn(most, weight.shape[1], device=weight.device).to(weight.dtype)
    number = min(-(-TIMED_BYTES // weight.nbytes), MOST_TIMED)
    weights = [weight, *(weight.clone() for _ in range(number - 1))]
    ways: list[Callable[[Tensor], Tensor]] = [lambda one: F.linear(states, one, bias)]
    ways += [functools.partial(multiply, states, bias=bias, shape=shape) for shape in SHAPES[most]]
    graphs = {place: graph for place, way in enumerate(ways) if (graph := _captured(way, weights)) is not None}
    times = [{place: _seconds(graph) for place, graph in graphs.items()} for _ in range(5)]
    best = min(graphs, key=lambda place: min(each[place] for each in times))
    return BestShape(best - 1 if best else None)


def _captured(way: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Any:
    """None where the card has no room for it."""
    try:
        for one in weights[:2]:
            way(one)
    except _found().OutOfResources:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in weights:
            way(one)
    return graph


def _seconds(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# -- a decoder layer but for its attention -----------------------------------------------------------------------------


@dataclass
class LayerTensors:
    """`native.Layer`, with tensors."""

    hidden: int
    heads: int
    groups: int
    size: int
    eps: float
    one_more: bool = False
    turned_first: bool = False
    gelu: bool = False
    residual: float = 1.0
    inner: int = 0
    in_norm: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    mixed_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    out_norm: Tensor | None = None
    qkv: Tensor | None = None
    qkv_bias: Tensor | None = None
    mix: Tensor | None = None
    mix_bias: Tensor | None = None
    gate_up: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None


Layer = LayerTensors  # its name among the operations of `native`
Goal = tuple[Tensor, Tensor, Tensor]  # keys and values (E, g, R, d) of the slots, rows (B, S) to write


def before_attention(
    layer: LayerTensors, states: Tensor, cos: Tensor, sin: Tensor, batch: int, rows: int, goal: Goal | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """states (R, H), cos and sin (B, S, d), all contiguous -> query (B, h, S, d), key and value (B, g, S, d), or,
    with a goal, all of its rows (E, g, R, d), the new ones written there."""
    heads, groups, size = layer.heads, layer.groups, layer.size
    normed = states if layer.in_norm is None else rms_norm(states, layer.in_norm, layer.eps, one_more=layer.one_more)
    assert layer.qkv is not None
    product = linear(normed, layer.qkv, layer.qkv_bias)
    query = states.new_empty(batch, rows, heads, size)
    if goal is None:
        made = (states.new_empty(batch, rows, groups, size).transpose(1, 2) for _ in range(2))
        key, value, places = (*made, None)
    else:
        key, value, places = goal
        assert key.stride(3) == value.stride(3) == 1 and places.shape == (batch, rows) and places.is_contiguous()
    _found().turn[len(states), heads + 2 * groups](
        product, cos, sin, layer.query_norm, layer.key_norm, query, key, value, places, rows, heads, groups,
        size // 2, layer.eps, *key.stride()[:3], *value.stride()[:3],
        HAS_NORMS=layer.query_norm is not None, TURNED_FIRST=bool(layer.turned_first), ONE_MORE=bool(layer.one_more),
        HAS_PLACES=places is not None, BLOCK=_power(size // 2), num_warps=1,
    )  # fmt: skip
    return query.transpose(1, 2), key, value


def behind_attention(layer: LayerTensors, states: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """states (R, H) and the attention's result (R, h * d), both contiguous -> the layer's result (R, H); where it has
    no gated product here the sum of states and attention, and beside it that sum's norm."""
    assert layer.mix is not None
    added = linear(mixed, layer.mix, layer.mix_bias)
    total, normed = _add_norm(layer, states, added, layer.mixed_norm, layer.mlp_norm)
    if layer.gate_up is None or layer.down is None:
        return total, normed
    gates = linear(normed, layer.gate_up, layer.gate_up_bias)
    opened = states.new_empty(len(states), layer.inner)
    grid = (len(states), -(-layer.inner // GATES))
    _found().gate[grid](gates, opened, layer.inner, GELU=bool(layer.gelu), BLOCK=GATES)
    added = linear(opened, layer.down, layer.down_bias)
    out, _ = _add_norm(layer, total, added, layer.out_norm, None)
    return out, normed


def _add_norm(
    layer: LayerTensors, states: Tensor, addend: Tensor, its_norm: Tensor | None, next_norm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """states + residual * addend (R, H), and its norm; itself where there is none."""
    out = torch.empty_like(states)
    normed = out if next_norm is None else torch.empty_like(states)
    _found().add_norm[len(states),](
        states, addend, its_norm, next_norm, out, normed, layer.hidden, layer.eps, layer.residual,
        HAS_ITS=its_norm is not None, HAS_NEXT=next_norm is not None, ONE_MORE=bool(layer.one_more),
        BLOCK=_power(layer.hidden), num_warps=_warps(layer.hidden),
    )  # fmt: skip
    return out, normed


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
    """(.., H) scaled to RMS 1 and by `weight` (H,), or by 1 + weight."""
    size = len(weight)
    states = states.contiguous()
    out = torch.empty_like(states)
    _found().rms_norm[states.numel() // size,](
        states, weight, out, size, size, size, eps, ONE_MORE=one_more, BLOCK=_power(size), num_warps=_warps(size)
    )
    return out


def beside(ids: Tensor, table: Tensor, first: Tensor, states: Tensor, second: Tensor, eps: float) -> Tensor | None:
    """Rows of a table (V, H) by their ids (..) and states (.., H), normed by `first` and `second`, side by side. None
    where PyTorch should do it."""
    if len({states.dtype, table.dtype, first.dtype, second.dtype}) > 1 or not table.is_contiguous() or not fits(states):
        return None
    size, states = states.shape[-1], states.contiguous()
    out = states.new_empty(*ids.shape, 2 * size)
    _found().beside[ids.numel(), 2](
        ids.contiguous(), table, first, states, second, out, size, eps, BLOCK=_power(size), num_warps=_warps(size)
    )
    return out


# -- attention ---------------------------------------------------------------------------------------------------------


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` takes these: few rows, one mask for all heads, heads of a usual size."""
    batch, heads, rows, size = query.shape
    if not fits(query, key, value) or not 0 < rows <= MOST_ROWS or size > MOST_HEAD or heads % key.shape[1]:
        return False
    if value.shape != key.shape or {key.dtype, value.dtype} != {query.dtype} or key.stride(3) != 1:
        return False
    if mask is None:
        return rows == 1
    shown = mask.dim() == 4 and mask.shape[1:] == (1, rows, key.shape[2]) and mask.shape[0] in (1, batch)
    return shown and mask.is_floating_point() and mask.stride(3) == 1


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query (B, h, S, d), key and value (B, g, K, d), mask (B or 1, 1, S, K) added to scores -> (B, S, h, d)."""
    (batch, heads, rows, size), (groups, keys) = query.shape, key.shape[1:3]
    query, value = (one if one.stride(3) == 1 else one.contiguous() for one in (query, value))
    lines = rows * heads // groups
    block = 16 if query.dtype is torch.float32 else min(64, max(16, _power(lines)))
    at_a_time, stages = _cut(max(16, _power(size)), block, query.element_size())
    blocks = -(-lines // block)
    parts = min(-(-PROGRAMS // (batch * groups * blocks)), -(-keys // KEYS), MOST_PARTS)
    split = -(-keys // (parts * KEYS)) * KEYS
    parts = -(-keys // split)
    out = query.new_empty(batch, rows, heads, size)
    mixed, sums = out, out
    if parts > 1:
        mixed = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
        sums = torch.empty(parts, *out.shape[:3], dtype=torch.float32, device=out.device)
    masked = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))
    operations = _found()
    operations.attend[blocks, parts, batch * groups](
        query, key, value, mask, mixed, sums, scale, rows, keys, split, heads, groups, size, *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *masked, HAS_MASK=mask is not None, IN_PARTS=parts > 1,
        PRECISION="ieee", SIZE=max(16, _power(size)), BLOCK_M=block, BLOCK_N=at_a_time, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        operations.join_parts[batch * rows * heads,](
            mixed, sums, out, batch * rows * heads, parts, size, SIZE=_power(size), PARTS=_power(parts), num_warps=2
        )
    return out


def _cut(size: int, block: int, itemsize: int) -> tuple[int, int]:
    """How many keys at a time, and how many such are under way, that a multiprocessor's memory holds beside the
    queries. Without matrix units (float32) registers are what is short."""
    if itemsize == 4:
        return CUTS[-1]
    fits = (cut for cut in CUTS if (2 * cut[0] * cut[1] * size + block * (size + cut[0])) * itemsize <= _room())
    return next(fits, CUTS[-1])


@functools.cache
def _room() -> int:
    """Bytes that a program can share."""
    if not torch.cuda.is_available():
        return 1 << 30
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(card, "shared_memory_per_block_optin", 99 << 10))


def _found() -> Any:
    found = kernels()
    assert found is not None, "asked for by those who have looked"
    return found


def _power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def _warps(size: int) -> int:
    return min(16, max(1, _power(size) // 512))
