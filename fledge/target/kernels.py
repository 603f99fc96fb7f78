"""Triton kernels of a decoder layer for few rows: what `native.c` is on a CPU. `gpu.py` calls them and says the shapes.

They round where transformers' own code does, operation by operation.
"""

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources as OutOfResources


@triton.jit
def _scaled(x, weight, cols, eps, kind: tl.constexpr, ONE_MORE: tl.constexpr):
    """x (BLOCK,) float32, zero behind its `cols` numbers, at RMS 1 and times `weight`, or times 1 + weight."""
    x = x * tl.math.rsqrt(tl.sum(x * x, 0) / cols + eps)
    if ONE_MORE:
        return x * (weight + 1.0)
    return x.to(kind).to(tl.float32) * weight


@triton.jit
def rms_norm(states, weight, out, in_stride, out_stride, cols, eps, ONE_MORE: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < cols
    kind: tl.constexpr = out.dtype.element_ty
    x = tl.load(states + row * in_stride + c, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + c, _scaled(x, w, cols, eps, kind, ONE_MORE).to(kind), mask=inside)


@triton.jit
def beside(ids, table, first, states, second, out, cols, eps, BLOCK: tl.constexpr):
    """Of a row the table's half or that of the states."""
    row, half, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = c < cols
    kind: tl.constexpr = out.dtype.element_ty
    if half == 0:
        x = tl.load(table + tl.load(ids + row) * cols + c, mask=inside, other=0.0)
        w = tl.load(first + c, mask=inside, other=0.0)
    else:
        x = tl.load(states + row * cols + c, mask=inside, other=0.0)
        w = tl.load(second + c, mask=inside, other=0.0)
    y = _scaled(x.to(tl.float32), w.to(tl.float32), cols, eps, kind, False)
    tl.store(out + (2 * row + half) * cols + c, y.to(kind), mask=inside)


@triton.jit
def add_norm(
    states, addend, its_norm, next_norm, out, normed, cols, eps, residual,
    HAS_ITS: tl.constexpr, HAS_NEXT: tl.constexpr, ONE_MORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states + residual * addend, the addend normed before, and the sum's norm."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = c < cols, row * cols + c
    kind: tl.constexpr = out.dtype.element_ty
    x = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(addend + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ITS:
        w = tl.load(its_norm + c, mask=inside, other=0.0).to(tl.float32)
        more = _scaled(more, w, cols, eps, kind, ONE_MORE).to(kind).to(tl.float32)
    more = (more * residual).to(kind).to(tl.float32)
    total = (x + more).to(kind)
    tl.store(out + at, total, mask=inside)
    if HAS_NEXT:
        w = tl.load(next_norm + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, _scaled(total.to(tl.float32), w, cols, eps, kind, ONE_MORE).to(kind), mask=inside)


@triton.jit
def _turned(low, high, cos, sin, at, c, inside, half, kind: tl.constexpr):
    """Both halves of a head rotated, rounded after each operation."""
    cos_low = tl.load(cos + at + c, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + at + half + c, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + at + c, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + at + half + c, mask=inside, other=0.0).to(tl.float32)
    first = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    second = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    return first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)


@triton.jit
def _normed_halves(low, high, norm, c, inside, half, eps, kind: tl.constexpr, ONE_MORE: tl.constexpr):
    scale = tl.math.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * half) + eps)
    w_low = tl.load(norm + c, mask=inside, other=0.0).to(tl.float32)
    w_high = tl.load(norm + half + c, mask=inside, other=0.0).to(tl.float32)
    if ONE_MORE:
        low, high = low * scale * (w_low + 1.0), high * scale * (w_high + 1.0)
    else:
        low, high = (low * scale).to(kind).to(tl.float32) * w_low, (high * scale).to(kind).to(tl.float32) * w_high
    return low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def turn(
    product, cos, sin, query_norm, key_norm, query, key, value, places, rows, heads, groups, half, eps,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    HAS_NORMS: tl.constexpr, TURNED_FIRST: tl.constexpr, ONE_MORE: tl.constexpr, HAS_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row of a product (R, (h + 2 g) d): a query's or key's is normed and rotated, a value's moved."""
    line, head, c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside, size = c < half, 2 * half
    kind: tl.constexpr = query.dtype.element_ty
    source = product + (line * (heads + 2 * groups) + head) * size
    low = tl.load(source + c, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + c, mask=inside, other=0.0).to(tl.float32)
    batch, row = line // rows, line % rows
    if HAS_PLACES:
        row = tl.load(places + line)
    if head < heads + groups:
        if HAS_NORMS and not TURNED_FIRST:
            norm = query_norm if head < heads else key_norm
            low, high = _normed_halves(low, high, norm, c, inside, half, eps, kind, ONE_MORE)
        low, high = _turned(low, high, cos, sin, line * size, c, inside, half, kind)
        if HAS_NORMS and TURNED_FIRST:
            norm = query_norm if head < heads else key_norm
            low, high = _normed_halves(low, high, norm, c, inside, half, eps, kind, ONE_MORE)
    if head < heads:
        goal = query + (line * heads + head) * size
    elif head < heads + groups:
        goal = key + batch * key_batch + (head - heads) * key_head + row * key_row
    else:
        goal = value + batch * value_batch + (head - heads - groups) * value_head + row * value_row
    tl.store(goal + c, low.to(kind), mask=inside)
    tl.store(goal + half + c, high.to(kind), mask=inside)


@triton.jit
def gate(gates, out, inner, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """silu or gelu (by tanh) of the first half of a row (2 I,), times its second half."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < inner
    kind: tl.constexpr = out.dtype.element_ty
    g = tl.load(gates + 2 * row * inner + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + (2 * row + 1) * inner + c, mask=inside, other=0.0).to(tl.float32)
    slope = 1.5957691216 * (g + 0.044715 * g * g * g) if GELU else g
    tl.store(out + row * inner + c, ((g * tl.sigmoid(slope)).to(kind).to(tl.float32) * up).to(kind), mask=inside)


@triton.jit
def multiply_row(
    states, weight, bias, out, outputs, inputs, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr
):
    """One row (X,) by a block of a weight's (C, X) outputs."""
    c, x = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_X)
    wanted, total = c < outputs, tl.zeros((BLOCK_C, BLOCK_X), tl.float32)
    at = weight + c[:, None].to(tl.int64) * inputs + x[None, :]
    for first in range(0, inputs, BLOCK_X):
        there = first + x < inputs
        some = tl.load(at + first, mask=wanted[:, None] & there[None, :], other=0.0)
        total += some.to(tl.float32) * tl.load(states + first + x, mask=there, other=0.0).to(tl.float32)[None, :]
    found = tl.sum(total, 1)
    if HAS_BIAS:
        found += tl.load(bias + c, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + c, found.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["rows"])
def multiply_rows(
    states, weight, bias, out, rows, outputs, inputs,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """A block of the rows (R, X) by a block of a weight's (C, X) outputs."""
    c, x = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_X)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted, asked = c < outputs, r < rows
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    of_weight = weight + c[:, None].to(tl.int64) * inputs + x[None, :]
    of_states = states + r[None, :] * inputs + x[:, None]
    for first in range(0, inputs, BLOCK_X):
        there = first + x < inputs
        some = tl.load(of_weight + first, mask=wanted[:, None] & there[None, :], other=0.0)
        their = tl.load(of_states + first, mask=there[:, None] & asked[None, :], other=0.0)
        total = tl.dot(some, their, total)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=wanted, other=0.0).to(tl.float32)[:, None]
    goal = out + r[None, :] * outputs + c[:, None]
    tl.store(goal, total.to(out.dtype.element_ty), mask=wanted[:, None] & asked[None, :])


@triton.jit
def _weighed(most, total, mixed, scores, v, PRECISION: tl.constexpr):
    """The largest score of a row, the sum of its weights and its weighted values (M, d), with more keys taken in."""
    more = tl.maximum(most, tl.max(scores, 1))
    weights, kept = tl.exp(scores - more[:, None]), tl.exp(most - more)
    mixed = mixed * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return more, total * kept + tl.sum(weights, 1), mixed


@triton.jit(do_not_specialize=["rows", "keys"])
def attend(
    query, key, value, mask, out, sums, scale, rows, keys, split, heads, groups, size,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask_batch, mask_row,
    HAS_MASK: tl.constexpr, IN_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of the rows of all query heads of one key head, over one part of the keys.

    `out` (B, S, h, d), or in parts (parts, B, S, h, d) float32 beside `sums` (parts, B, S, h), the logarithm of what
    the part's weights sum up to.
    """
    part, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, group, shared = pair // groups, pair % groups, heads // groups
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, SIZE)
    row, head = m // shared, group * shared + m % shared
    wanted, whole = m < rows * shared, d < size
    at = query + batch * query_batch + row[:, None] * query_row + head[:, None] * query_head
    q = tl.load(at + d[None, :], mask=wanted[:, None] & whole[None, :], other=0.0)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, SIZE), tl.float32)
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    for first in range(part * split, tl.minimum((part + 1) * split, keys), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = n < keys
        k = tl.load(key + n[None, :] * key_row + d[:, None], mask=there[None, :] & whole[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_MASK:
            shown = mask + batch * mask_batch + row[:, None] * mask_row + n[None, :]
            scores += tl.load(shown, mask=wanted[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], scores, float("-inf"))
        v = tl.load(value + n[:, None] * value_row + d[None, :], mask=there[:, None] & whole[None, :], other=0.0)
        most, total, mixed = _weighed(most, total, mixed, scores, v, PRECISION)
    mixed = mixed / total[:, None]
    place = (batch * rows + row) * heads + head
    if IN_PARTS:
        place += part.to(tl.int64) * rows * heads * (tl.num_programs(2) // groups)
        tl.store(sums + place, most + tl.log(total), mask=wanted)
    goal = out + place[:, None] * size + d[None, :]
    tl.store(goal, mixed.to(out.dtype.element_ty), mask=wanted[:, None] & whole[None, :])


@triton.jit(do_not_specialize=["lines", "parts"])
def join_parts(mixed, sums, out, lines, parts, size, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one head of one row: (parts, lines, d) weighed by exp of (parts, lines), to (lines, d)."""
    line, p, d = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, SIZE)
    there, whole = p < parts, d < size
    of_parts = tl.load(sums + p * lines + line, mask=there, other=float("-inf"))
    weights = tl.exp(of_parts - tl.max(of_parts, 0))
    at = (p[:, None] * lines + line) * size + d[None, :]
    each = tl.load(mixed + at, mask=there[:, None] & whole[None, :], other=0.0)
    found = tl.sum(each * (weights / tl.sum(weights, 0))[:, None], 0)
    tl.store(out + line * size + d, found.to(out.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=["rows", "blocks", "joint"])
def attend_exact(
    query, key, value, mask, lengths, levels, path, mixed, sums, scale, rows, blocks, joint, heads, groups, size,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask_batch, mask_row,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    PART: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of the positions, the same for every row and every tree. To `mixed` (parts, B, S, h, d) and `sums`
    (parts, B, S, h), as `attend` in parts.

    The first `joint` programs have a block of rows each and a part within the prefix, which all rows see alike. Each of
    the others has one node and a part behind it, where a position's key is that of the node's own ancestor.
    """
    program, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group, shared = pair // groups, pair % groups, heads // groups
    length = tl.load(lengths + batch)
    own = program >= joint
    node = tl.where(own, (program - joint) % rows, 0)
    part = tl.where(own, length // PART + (program - joint) // rows, program // blocks)
    line = tl.where(own, node * shared, (program % blocks) * BLOCK_M)
    last_line = tl.where(own, line + shared, rows * shared)
    seen = tl.where(own, length + tl.load(levels + batch * rows + node) + 1, length // PART * PART)
    start = part * PART
    m, d = line + tl.arange(0, BLOCK_M), tl.arange(0, SIZE)
    row, head = m // shared, group * shared + m % shared
    wanted, whole = (m < last_line) & (start < seen), d < size
    at = query + batch * query_batch + row[:, None] * query_row + head[:, None] * query_head
    q = tl.load(at + d[None, :], mask=wanted[:, None] & whole[None, :], other=0.0)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, SIZE), tl.float32)
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    path += (batch * rows + node) * rows
    for first in range(start, tl.minimum(start + PART, seen), BLOCK_N):
        p = first + tl.arange(0, BLOCK_N)
        there, drawn = p < seen, (p < seen) & (p >= length)
        n = tl.where(drawn, length + tl.load(path + p - length, mask=drawn, other=0), p)
        k = tl.load(key + n[None, :] * key_row + d[:, None], mask=there[None, :] & whole[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_MASK:
            shown = mask + batch * mask_batch + row[:, None] * mask_row + n[None, :]
            scores += tl.load(shown, mask=wanted[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], scores, float("-inf"))
        v = tl.load(value + n[:, None] * value_row + d[None, :], mask=there[:, None] & whole[None, :], other=0.0)
        most, total, out = _weighed(most, total, out, scores, v, PRECISION)
    place = ((part * (tl.num_programs(1) // groups) + batch) * rows + row) * heads + head
    tl.store(sums + place, most + tl.log(total), mask=wanted)
    goal = mixed + place[:, None] * size + d[None, :]
    tl.store(goal, out / total[:, None], mask=wanted[:, None] & whole[None, :])


@triton.jit(do_not_specialize=["rows", "lines"])
def join_exact(
    mixed, sums, lengths, levels, out, rows, heads, lines, size, PART: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """The parts that one head of one row has, one after the other: to (lines, d)."""
    line, d = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    whole, row = d < size, line // heads
    last = tl.load(lengths + row // rows) + tl.load(levels + row)
    most = tl.load(sums + line)
    total = most * 0.0 + 1.0
    found = tl.load(mixed + line * size + d, mask=whole, other=0.0)
    for part in range(1, last // PART + 1):
        at = part * lines + line
        its = tl.load(sums + at)
        more = tl.maximum(most, its)
        kept, weight = tl.exp(most - more), tl.exp(its - more)
        total = total * kept + weight
        found = found * kept + weight * tl.load(mixed + at * size + d, mask=whole, other=0.0)
        most = more
    tl.store(out + line * size + d, (found / total).to(out.dtype.element_ty), mask=whole)
