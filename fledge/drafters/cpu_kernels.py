"""Everything that training does for the sake of a CPU, so that the rest of the code reads as on a GPU.

    product, linear, through, gated_linear, rms_norm    products and layers; each is PyTorch's own where that is as good
    ProductAttention                           attention over step-0 keys for 16-bit numbers (`suits`)
    round_up, pad_index, filled_up, spare_rows number of rows as multiples of MULTIPLE
    is_argmax                                  a row's maximum, which is cheaper than its place

*Products.* PyTorch multiplies fp32 on a CPU with MKL. On the machine of dev/log (AMD, AVX-512) oneDNN is 1.05 to 1.6
times as fast at the shapes of a training step where the right factor is a weight. MKL is faster by 1.1 for the gradient
of a weight, whose factors are both transposed.

*Few shapes.* oneDNN and PyTorch's layer above it keep half a MiB for every shape of product they have met, and
conversations have all lengths (dev/log, "A leak of shapes"). So the numbers of rows are rounded up to multiples of 64,
by rows that teach nothing.

*Backwards that keep little.* Autograd keeps what every operation read: for a norm its input in fp32 once more, for a
gated product two extra copies of the widest activations. Both are cheap to compute again from what others hold anyway.

`F.linear`, `F.rms_norm`, plain autograd and `dense_ttt_attention` are the slow twins in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.drafters.batch import Batch
from fledge.drafters.runs import Run
from fledge.target.linear import fits_onednn, onednn_product
from fledge.target.record import TargetRecord, TeacherSummary

MULTIPLE = 64  # rows
FILLER_ID = "\0filler"  # sample id of the record that fills a batch up

# -- products ----------------------------------------------------------------------------------------------------------


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (R, X) @ right (C, X).T -> (R, C), without gradient; views may be transposed."""
    if fits_onednn(left, right):
        return onednn_product(_dense(left), _dense(right))
    return left @ right.T


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """F.linear(inputs (.., X), weight (C, X)), with gradients."""
    autocast = torch.is_autocast_enabled(inputs.device.type)
    if autocast or not torch.is_grad_enabled() or not fits_onednn(inputs, weight):
        return F.linear(inputs, weight)
    return _Linear.apply(inputs, weight)


def through(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """layer(inputs), which decoding may have accelerated; in training by `linear`."""
    return linear(inputs, layer.weight) if torch.is_grad_enabled() else layer(inputs)


def _dense(matrix: Tensor) -> Tensor:
    """oneDNN multiplies slices of a wider matrix by its reference code, a hundred times slower."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs.reshape(-1, inputs.shape[-1]), weight).view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inputs = product(grad, weight.T).view_as(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ inputs.reshape(-1, inputs.shape[-1]) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight


def is_argmax(scores: Tensor, highest: Tensor, wanted: Tensor) -> Tensor:
    """(R,) whether `wanted` is the argmax of its row of scores (R, C), whose maxima are `highest`."""
    wanted = wanted.clamp(max=scores.shape[-1] - 1)
    if scores.device.type != "cpu":
        return scores.argmax(-1) == wanted
    found = scores.gather(1, wanted[:, None])[:, 0] == highest
    rows = found.nonzero()[:, 0]
    found[rows] = scores[rows].max(-1).indices == wanted[rows]  # of equal maxima, one
    return found


# -- layers whose backwards keep little --------------------------------------------------------------------------------


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension, which CUDA has as one kernel."""
    if hidden.device.type == "cpu" and torch.is_grad_enabled():
        return _Norm.apply(hidden, weight, eps)
    return F.rms_norm(hidden, weight.shape, weight, eps)


class _Norm(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * weight, keeping x and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        unit = hidden.float() * scale
        grad = grads[0].float()
        grad_weight = (grad * unit).reshape(-1, grad.shape[-1]).sum(0)
        grad = grad * weight
        inner = (grad * unit).mean(-1, keepdim=True)
        grad_hidden = grad.sub_(unit.mul_(inner)).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T, on every device: gate and up (.., I), weight (H, I) -> (.., H)."""
    return _GatedLinear.apply(gate, up, weight)


class _GatedLinear(torch.autograd.Function):
    """Keeps gate and up; silu(gate) * up is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        opened = F.silu(gate).mul_(up)
        return product(opened.reshape(-1, opened.shape[-1]), weight.to(gate.dtype)).view(
            *gate.shape[:-1], weight.shape[0]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0]
        opened = F.silu(gate)
        gated = opened * up
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.T @ gated.reshape(-1, gated.shape[-1])
        grad_product = product(flat, weight.to(grad.dtype).T).view_as(gate)
        torch.mul(grad_product, up, out=gated)  # the gradient of silu(gate)
        grad_gate = torch.ops.aten.silu_backward(gated, gate)
        return grad_gate, grad_product.mul_(opened), grad_weight.to(weight.dtype)


# -- rows rounded up ---------------------------------------------------------------------------------------------------


def round_up(number: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-number // MULTIPLE) * MULTIPLE


def pad_index(index: Tensor) -> Tensor:
    """(m,) -> (m',) the next multiple, zeros behind."""
    return F.pad(index, (0, -len(index) % MULTIPLE))


def filled_up(records: Sequence[TargetRecord], device: torch.device) -> list[TargetRecord]:
    """The records of a batch and, for a CPU, one of zeros that brings their rows to a multiple.

    It has at least MULTIPLE rows, which `spare_rows` lends to the rows that are trained, and it teaches nothing.
    """
    if device.type != "cpu":
        return list(records)
    number = MULTIPLE - sum(map(len, records)) % MULTIPLE + MULTIPLE
    return [*records, _zeros(number, records[0])]


def num_filler(batch: Batch) -> int:
    """Rows of a batch that `filled_up` added."""
    return batch.lengths[-1] if batch.sample_ids[-1] == FILLER_ID else 0


def spare_rows(batch: Batch, num_rows: int) -> tuple[Run, ...]:
    """Filler rows that bring so many active rows to a multiple; they are unrolled and not trained."""
    filler = num_filler(batch)
    first, number = len(batch.loss_mask) - filler, min(-num_rows % MULTIPLE, filler)
    return (Run(first, first, first + number),) if number else ()


def _zeros(length: int, like: TargetRecord) -> TargetRecord:
    """A record of zeros. It has a summary, so that a batch of records with summaries keeps them."""
    numbers = like.input_ids.new_zeros(length)
    return TargetRecord(
        sample_id=FILLER_ID,
        input_ids=numbers,
        loss_mask=numbers.bool(),
        position_ids=torch.arange(length, device=numbers.device),
        tap_hidden=like.tap_hidden.new_zeros((length, *like.tap_hidden.shape[1:])),
        last_hidden=like.last_hidden.new_zeros((length, *like.last_hidden.shape[1:])),
        summary=TeacherSummary(numbers, torch.zeros(length, device=numbers.device)),
    )


# -- attention over step-0 keys, for 16-bit numbers --------------------------------------------------------------------

# N rows of all documents, S query rows, h = g * r query heads, g key heads, d head_dim; s queries and n keys of a chunk

QUERIES = 128  # of a chunk
KEY_MULTIPLE = 128  # a chunk has a multiple of so many queries and of so many keys
EXTRA = 8  # columns more than a head's own: two are used, and products like widths that are multiples of eight


def suits(q: Tensor) -> bool:
    """Whether `ProductAttention` is the faster one for these queries."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionChunk:
    """Places of one document's queries, in the order of their rows, and the keys that any of them sees."""

    queries: slice
    keys: slice
    hidden: Tensor  # (s, m) bool: of the last m keys, those that a query does not see


class ProductAttention:
    """Attention of the query rows of `runs` as blocked matrix products.

    PyTorch's flash kernel for CPUs reaches a tenth of what the machine's bf16 products do (dev/log, "Attention in bf16
    on a CPU"). Here a document's query rows are taken in order, QUERIES at a time. Their scores are one product per key
    head over all keys up to the last row; only keys from the first row on need a mask. Rows may have holes between
    them. Chunks are filled up with queries of zeros, and with keys that no query sees, to few different shapes.

    Everything between the products is one pass over 16-bit numbers. The products of the backward subtract, too: a query
    has two columns more that hold its log-sum-exp, in two parts because one 16-bit number is too coarse for it, and a
    key has ones there:

        [q | -lse] . [k | 1] = s - lse                p = exp(s - lse)
        [grad | -delta] . [v | 1] = dp - delta        ds = p (dp - delta)

    The forward has these columns too, with zeros in the queries, so that all products are of three shapes. Scores are
    rounded to 16 bits where a flash kernel keeps them in fp32: gradients are off by 0.7 % instead of 0.5 %.
    """

    def __init__(self, runs: Sequence[Run], window: int | None) -> None:
        numbers_of: dict[int, list[int]] = {}  # a document's runs, in the order of their rows
        for number in sorted(range(len(runs)), key=lambda number: runs[number].start):
            numbers_of.setdefault(runs[number].first, []).append(number)
        sizes = [run.stop - run.start for run in runs]
        places_of = list(torch.empty(sum(sizes), dtype=torch.int64).split(sizes))
        self.chunks: list[AttentionChunk] = []
        self.num_places = 0
        for first, numbers in numbers_of.items():
            rows = torch.cat([torch.arange(runs[number].start, runs[number].stop) for number in numbers])
            places = torch.cat([self._add_chunk(some, first, window) for some in rows.split(QUERIES)])
            for number, part in zip(numbers, places.split([sizes[number] for number in numbers]), strict=True):
                places_of[number] = part
        self.places = torch.cat(places_of or [torch.empty(0, dtype=torch.int64)])  # (S,) of each query

    def _add_chunk(self, rows: Tensor, first: int, window: int | None) -> Tensor:
        """Add the chunk of these rows (s,) of the document that begins at `first`; returns their places (s,)."""
        lowest, num_rows = int(rows[0]), _round_up_keys(len(rows))
        oldest = first if window is None else max(first, lowest - window + 1)
        stop = oldest + _round_up_keys(int(rows[-1]) + 1 - oldest)
        key = torch.arange(lowest if window is None else oldest, stop)
        hidden = torch.zeros(num_rows, len(key), dtype=torch.bool)
        hidden[: len(rows)] = key > rows[:, None]
        if window is not None:
            hidden[: len(rows)] |= key <= rows[:, None] - window
        begin, self.num_places = self.num_places, self.num_places + num_rows
        self.chunks.append(AttentionChunk(slice(begin, self.num_places), slice(oldest, stop), hidden))
        return torch.arange(begin, begin + len(rows))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (S, h, d) over k, v (N, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
        size = q.shape[-1]
        queries = _widened(_by_group(self._placed(q), k.shape[1]) * size**-0.5)
        keys, values = _keys(k), _keys(v)
        out = queries.new_empty((*queries.shape[:3], size))
        lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
        for chunk in self.chunks:
            scores = _scores(queries, keys, chunk)
            highest = scores.amax(-1)
            weights = torch.softmax(scores, -1)
            lse[:, :, chunk.queries] = highest.float() - weights.amax(-1).float().log()
            attended = weights.flatten(1, 2) @ values[:, chunk.keys, :size]
            out[:, :, chunk.queries] = attended.unflatten(1, weights.shape[1:3])
        return _rows_first(out)[self.places], lse.permute(2, 0, 1).flatten(1)[self.places]

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in fp32, given the merged out and lse of all rows."""
        (num_rows, groups, size), scale = k.shape, q.shape[-1] ** -0.5
        delta = (grad_out.float() * out.float()).sum(-1)
        queries = _widened(_by_group(self._placed(q), groups) * scale, _by_group(self._placed(-lse), groups))
        grads = _widened(_by_group(self._placed(grad_out), groups), _by_group(self._placed(-delta), groups))
        keys, values = _keys(k), _keys(v)
        grad_q = queries.new_empty((*queries.shape[:3], size))
        grad_k, grad_v = (k.new_zeros((groups, keys.shape[1], size), dtype=torch.float32) for _ in range(2))
        for chunk in self.chunks:
            weights = _scores(queries, keys, chunk).exp_().flatten(1, 2)  # (g, r * s, n)
            query, grad = (part[:, :, chunk.queries].flatten(1, 2) for part in (queries, grads))
            grad_scores = (grad @ values[:, chunk.keys].transpose(1, 2)).mul_(weights)
            grad_query = grad_scores @ keys[:, chunk.keys, :size]
            grad_q[:, :, chunk.queries] = grad_query.unflatten(1, (queries.shape[1], -1))
            grad_k[:, chunk.keys] += grad_scores.transpose(1, 2) @ query[..., :size]
            grad_v[:, chunk.keys] += weights.transpose(1, 2) @ grad[..., :size]
        grad_q = _rows_first(grad_q.float().mul_(scale))[self.places]
        return grad_q, grad_k[:, :num_rows].transpose(0, 1), grad_v[:, :num_rows].transpose(0, 1)

    def _placed(self, rows: Tensor) -> Tensor:
        """(S, ..) -> (num_places, ..), zeros where there is no query."""
        return rows.new_zeros((self.num_places, *rows.shape[1:])).index_copy_(0, self.places, rows)


def _round_up_keys(number: int) -> int:
    return -(-number // KEY_MULTIPLE) * KEY_MULTIPLE


def _scores(queries: Tensor, keys: Tensor, chunk: AttentionChunk) -> Tensor:
    """(g, r, s, n), minus infinity where a query does not see."""
    query = queries[:, :, chunk.queries]
    scores = (query.flatten(1, 2) @ keys[:, chunk.keys].transpose(1, 2)).unflatten(1, query.shape[1:3])
    scores[..., scores.shape[-1] - chunk.hidden.shape[1] :].masked_fill_(chunk.hidden, float("-inf"))
    return scores


def _keys(states: Tensor) -> Tensor:
    """(N, g, d) -> (g, N + KEY_MULTIPLE, d + EXTRA): zero rows behind the last one, two columns of ones behind d."""
    num_rows, groups, size = states.shape
    wider = states.new_zeros((groups, num_rows + KEY_MULTIPLE, size + EXTRA))
    wider[:, :num_rows, :size] = states.transpose(0, 1)
    wider[..., size : size + 2] = 1
    return wider


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(S, h, ..) -> (g, r, S, ..): query heads by the key head they share."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, *range(3, rows.dim() + 1))


def _rows_first(states: Tensor) -> Tensor:
    """(g, r, S, d) -> (S, h, d)"""
    return states.permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _widened(states: Tensor, number: Tensor | None = None) -> Tensor:
    """(g, r, S, d) and (g, r, S) fp32 -> (g, r, S, d + EXTRA), the number in two parts."""
    size = states.shape[-1]
    wider = states.new_zeros((*states.shape[:3], size + EXTRA))
    wider[..., :size] = states
    if number is not None:
        wider[..., size] = number
        wider[..., size + 1] = number - wider[..., size].float()
    return wider
