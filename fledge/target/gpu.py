"""A decoder layer's operations on a GPU as few kernels: `native.py` there.

Of a captured step of Qwen3-8B on an H100 (9.5 ms, torch 2.11) the products took 6.2 ms, attention 1.2 ms at 640 keys
and some 12 at 8,200 (a few thread blocks for all keys of a head), and some thirty small operations a layer the rest.
Here projections of the same input are one product of joined weights, what stands between products is one kernel each,
and attention splits the keys. Kernels are Triton's (`kernels.py`), which PyTorch brings along for CUDA on Linux;
without it, for other devices and for odd shapes, PyTorch does it, the slow twin.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.target import card
from fledge.target.card import found, power
from fledge.target.gpu_products import linear, linear_exact

# B sequences, S rows, R = B S, H hidden size, h query heads, g key heads, d head_dim, K keys, I inner size

MOST_HEAD = 256
MOST_ROWS = 128  # of a sequence; with more, PyTorch's kernels have enough to do
PROGRAMS = 264  # of attention, two for each of an H100's multiprocessors
KEYS = 64  # the least that a program of attention takes
MOST_PARTS = 128
CUTS = ((64, 2), (32, 2), (32, 1), (16, 1))  # keys at a time and how many times they are kept, the fastest first
GATES = 1024  # numbers of a program


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
    layer: LayerTensors, states: Tensor, cos: Tensor, sin: Tensor, batch: int, rows: int, goal: Goal | None = None,
    *, exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """states (R, H), cos and sin (B, S, d), all contiguous -> query (B, h, S, d), key and value (B, g, S, d), or,
    with a goal, all of its rows (E, g, R, d), the new ones written there. `exact`: a row's bits do not depend on the
    others."""
    heads, groups, size = layer.heads, layer.groups, layer.size
    normed = states if layer.in_norm is None else rms_norm(states, layer.in_norm, layer.eps, one_more=layer.one_more)
    assert layer.qkv is not None
    product = (linear_exact if exact else linear)(normed, layer.qkv, layer.qkv_bias)
    query = states.new_empty(batch, rows, heads, size)
    if goal is None:
        made = (states.new_empty(batch, rows, groups, size).transpose(1, 2) for _ in range(2))
        key, value, places = (*made, None)
    else:
        key, value, places = goal
        assert key.stride(3) == value.stride(3) == 1 and places.shape == (batch, rows) and places.is_contiguous()
    found().turn[len(states), heads + 2 * groups](
        product, cos, sin, layer.query_norm, layer.key_norm, query, key, value, places, rows, heads, groups,
        size // 2, layer.eps, *key.stride()[:3], *value.stride()[:3],
        HAS_NORMS=layer.query_norm is not None, TURNED_FIRST=bool(layer.turned_first), ONE_MORE=bool(layer.one_more),
        HAS_PLACES=places is not None, BLOCK=power(size // 2), num_warps=1,
    )  # fmt: skip
    return query.transpose(1, 2), key, value


def behind_attention(
    layer: LayerTensors, states: Tensor, mixed: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """states (R, H) and the attention's result (R, h * d), both contiguous -> the layer's result (R, H); where it has
    no gated product here the sum of states and attention, and beside it that sum's norm."""
    assert layer.mix is not None
    product = linear_exact if exact else linear
    added = product(mixed, layer.mix, layer.mix_bias)
    total, normed = _add_norm(layer, states, added, layer.mixed_norm, layer.mlp_norm)
    if layer.gate_up is None or layer.down is None:
        return total, normed
    gates = product(normed, layer.gate_up, layer.gate_up_bias)
    opened = states.new_empty(len(states), layer.inner)
    grid = (len(states), -(-layer.inner // GATES))
    found().gate[grid](gates, opened, layer.inner, GELU=bool(layer.gelu), BLOCK=GATES)
    added = product(opened, layer.down, layer.down_bias)
    out, _ = _add_norm(layer, total, added, layer.out_norm, None)
    return out, normed


def _add_norm(
    layer: LayerTensors, states: Tensor, addend: Tensor, its_norm: Tensor | None, next_norm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """states + residual * addend (R, H), and its norm; itself where there is none."""
    out = torch.empty_like(states)
    normed = out if next_norm is None else torch.empty_like(states)
    found().add_norm[len(states),](
        states, addend, its_norm, next_norm, out, normed, layer.hidden, layer.eps, layer.residual,
        HAS_ITS=its_norm is not None, HAS_NEXT=next_norm is not None, ONE_MORE=bool(layer.one_more),
        BLOCK=power(layer.hidden), num_warps=_warps(layer.hidden),
    )  # fmt: skip
    return out, normed


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, one_more: bool = False) -> Tensor:
    """(.., H) scaled to RMS 1 and by `weight` (H,), or by 1 + weight."""
    size = len(weight)
    states = states.contiguous()
    out = torch.empty_like(states)
    found().rms_norm[states.numel() // size,](
        states, weight, out, size, size, size, eps, ONE_MORE=one_more, BLOCK=power(size), num_warps=_warps(size)
    )
    return out


def beside(ids: Tensor, table: Tensor, first: Tensor, states: Tensor, second: Tensor, eps: float) -> Tensor | None:
    """Rows of a table (V, H) by their ids (..) and states (.., H), normed by `first` and `second`, side by side. None
    where PyTorch should do it."""
    if (
        len({states.dtype, table.dtype, first.dtype, second.dtype}) > 1
        or not table.is_contiguous()
        or not card.fits(states)
    ):
        return None
    size, states = states.shape[-1], states.contiguous()
    out = states.new_empty(*ids.shape, 2 * size)
    found().beside[ids.numel(), 2](
        ids.contiguous(), table, first, states, second, out, size, eps, BLOCK=power(size), num_warps=_warps(size)
    )
    return out


# -- attention ---------------------------------------------------------------------------------------------------------


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` takes these: few rows, one mask for all heads, heads of a usual size."""
    batch, heads, rows, size = query.shape
    if not card.fits(query, key, value) or not 0 < rows <= MOST_ROWS or size > MOST_HEAD or heads % key.shape[1]:
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
    block = 16 if query.dtype is torch.float32 else min(64, max(16, power(lines)))
    at_a_time, stages = cut(max(16, power(size)), block, query.element_size())
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
    operations = found()
    operations.attend[blocks, parts, batch * groups](
        query, key, value, mask, mixed, sums, scale, rows, keys, split, heads, groups, size, *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *masked, HAS_MASK=mask is not None, IN_PARTS=parts > 1,
        PRECISION="ieee", SIZE=max(16, power(size)), BLOCK_M=block, BLOCK_N=at_a_time, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        operations.join_parts[batch * rows * heads,](
            mixed,
            sums,
            out,
            batch * rows * heads,
            parts,
            size,
            SIZE=power(size),
            PARTS=power(parts),
            num_warps=2,
        )
    return out


def cut(size: int, block: int, itemsize: int) -> tuple[int, int]:
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


def _warps(size: int) -> int:
    return min(16, max(1, power(size) // 512))
