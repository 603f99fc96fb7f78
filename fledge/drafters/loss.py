"""The TTT loss: head, teacher and gradient in one pass over chunks of rows, each with all its steps.

    loss = sum_k step_weight_k * mean_rows( -sum_v p(v) log q_k(v) )

p is the target's softmax restricted to the draft vocabulary. A position counts only where the target's own argmax is a
draft token. The teacher depends on the position alone, so a chunk computes the logits of its positions once for all K
steps. (The K - 1 positions that two neighbouring chunks share are computed twice.) Where the record has a
`TeacherSummary` these are the logits of the draft vocabulary alone, else of all V tokens. A chunk has all steps of its
rows, so weights that depend on the draft's confidence need no extra pass. The draft's logits are turned into their
gradient in place and multiplied out before the next chunk. So neither [N, V] teacher logits nor K x [N, D] draft logits
ever exist, and the backward is two multiplications by the incoming gradient.

`dense_loss` is the slow twin: whole matrices and autograd.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.drafters.alignment import Alignment
from fledge.drafters.cpu_kernels import MULTIPLE, is_argmax, pad_index, product
from fledge.drafters.position_weights import CONFIDENCE_FLOOR, STEP_DECAY, averaging_weights, dynamic_weights
from fledge.target.record import TeacherSummary

# P teacher positions, C chunk of them, K steps, M pairs of a position and a step, m chunk of them, S active rows
# D draft vocab, V target vocab

# Memory for one chunk's matrices: large enough for full-speed products, small beside the activations.
CHUNK_BYTES = {"cpu": 41 * 2**19, "cuda": 512 * 2**20}
WEIGHT_ROWS = 1024  # rows of the head whose 16-bit gradients exist at a time
Average = Literal["sequence", "token"]
PositionWeights = Literal["fixed", "dynamic"]
PairWeightFn = Callable[[Callable[[], Tensor]], Tensor]
"""(m,) weights of a chunk's pairs, from the draft's (m,) probability of the target's choice if needed."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    position_weights: PositionWeights = "dynamic"
    """dynamic: the share of a row's expected accept length that lies at step k or deeper. fixed: STEP_DECAY ** k."""
    average: Average = "sequence"
    """Mean within each sequence, then over sequences; or over all tokens alike."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The target over a batch."""

    last_hidden: Tensor  # (N, H)
    head: Callable[[Tensor], Tensor]  # (C, H) -> (C, V)
    draft_head: Callable[[Tensor], Tensor] | None = None  # (C, H) -> (C, D), the same logits of the draft vocabulary
    summary: TeacherSummary | None = None  # (N,) each; with draft_head it spares `head`

    @property
    def is_short(self) -> bool:
        """Whether only the draft vocabulary's logits are computed."""
        return self.draft_head is not None and self.summary is not None

    def read(self, positions: Tensor, draft_ids: Tensor, t2d: Tensor) -> "TeacherChunk":
        """(C,) rows of the batch -> the target there; draft_ids (D,), t2d (V,)."""
        hidden = self.last_hidden[positions]
        if self.draft_head is not None and self.summary is not None:
            inside, known = self.draft_head(hidden), self.summary[positions]
            return TeacherChunk.of(inside, known.argmax, lambda: known.logsumexp, draft_ids, t2d)
        logits = self.head(hidden)
        argmax = logits.max(-1).indices  # several times faster than argmax on CPU
        inside = logits if len(draft_ids) == logits.shape[-1] else logits[:, draft_ids]
        return TeacherChunk.of(inside, argmax, lambda: logits.float().logsumexp(-1), draft_ids, t2d)


class LossOutput(NamedTuple):
    """The loss to minimise and the sums behind every printed metric (so that ranks and steps can be added up).

    A tuple, because what wraps a module to shard it looks for tensors in tuples.
    """

    loss: Tensor  # () sum over sequences (or tokens); divide by the number of them in the whole optimisation step
    step_loss: Tensor  # (K,) summed over rows
    trained: Tensor  # (K,) rows that are trained at each step
    hits: Tensor  # (K,) rows whose top-1 is the target's argmax; targets outside the draft vocabulary are misses
    prefix_hits: Tensor  # (K,) rows right at this step and at every earlier one
    overlap: Tensor  # (K,) summed sum_v min(p(v), q(v)), the acceptance at T = 1; zero with gradient
    covered: Tensor  # () positions whose target argmax is a draft token
    positions: Tensor  # ()


def ttt_loss(
    states: Sequence[Tensor],
    head_weight: Tensor,
    teacher: Teacher,
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> LossOutput:
    """Loss of one batch.

    states: for each of K steps (S_k, H) normed draft states; head_weight (D, H) the draft's lm_head; draft_ids (D,)
    target ids of the draft vocabulary; t2d (V,) bool.
    """
    flat = torch.cat(list(states))
    device_type = flat.device.type
    if torch.is_autocast_enabled(device_type):
        flat = flat.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):  # dtypes are chosen here: states' for the head, fp32 for the rest
        results = _FusedLoss.apply(
            flat, head_weight, teacher, draft_ids, t2d, alignment, settings, torch.is_grad_enabled()
        )
    loss, losses, hits, overlaps, covered = results
    pairs, num_steps = alignment.pairs, len(alignment.row_index)
    right = hits.new_zeros((num_steps, len(alignment.rows)), dtype=torch.bool)  # (K, S)
    right[pairs.step, alignment.row_index[pairs.step, pairs.place]] = hits

    def by_step(values: Tensor) -> Tensor:
        return values.new_zeros(num_steps).index_add_(0, pairs.step, values)

    return LossOutput(
        loss=loss,
        step_loss=by_step(losses),
        trained=alignment.trained.sum(1),
        hits=by_step(hits.long()),
        prefix_hits=right.cummin(dim=0).values.sum(1),
        overlap=by_step(overlaps),
        covered=covered,
        positions=torch.full((), len(alignment.positions), device=flat.device),
    )


class PairWeights:
    """How much each pair counts: the average it is part of, and its step's weight, fixed or dynamic."""

    def __init__(self, alignment: Alignment, settings: LossSettings) -> None:
        self.pairs, self.settings = alignment.pairs, settings
        self.known = averaging_weights(alignment, settings.average)  # (M,)
        if settings.position_weights == "fixed":
            self.known = self.known * STEP_DECAY**self.pairs.step

    def of(self, rows: slice, part: slice, confidence: Callable[[], Tensor]) -> Tensor:
        """(m,) weights of the pairs `part`, which are all those of `rows`; confidence: see `dynamic_weights`."""
        if self.settings.position_weights == "fixed":
            return self.known[part]
        row, supervised = self.pairs.row[part] - rows.start, self.pairs.supervised[:, rows]
        return self.known[part] * dynamic_weights(
            confidence(), row, self.pairs.step[part], supervised, CONFIDENCE_FLOOR
        )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, teacher: Teacher, draft_ids: Tensor, t2d: Tensor,
        alignment: Alignment, settings: LossSettings, wants_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pairs, weights = alignment.pairs, PairWeights(alignment, settings)
        sums = _Sums(states, head_weight, len(pairs.place), wants_grad)
        steps = max(1, round(len(pairs.place) / max(1, len(alignment.positions))))
        max_pairs = pairs_per_chunk(len(draft_ids), len(t2d), states.device.type, steps=steps, short=teacher.is_short)
        max_pairs = max(1, max_pairs // (1 if wants_grad else 3))
        for chunk in pairs.chunks(max_pairs, len(alignment.positions)):
            positions = alignment.positions[chunk.places]
            taught = teacher.read(pad_index(positions), draft_ids, t2d)
            own = pairs.place[chunk.pairs] - chunk.places.start
            weight_fn = functools.partial(weights.of, chunk.rows, chunk.pairs)
            _add_chunk(sums, chunk.pairs, pairs.state[chunk.pairs], own, taught, weight_fn)
            sums.covered += taught.covered[chunk.seen : len(positions)].sum()
        if wants_grad:
            ctx.save_for_backward(sums.grad_states, sums.grad_weight)
        ctx.head_dtype = head_weight.dtype
        outputs = (sums.losses, sums.hits, sums.overlaps, sums.covered)
        ctx.mark_non_differentiable(*outputs)
        return sums.total, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        # In place: these are read once. A second backward through the same loss is refused by autograd's version check.
        return grad_states.mul_(grads[0]), grad_weight.mul_(grads[0]).to(ctx.head_dtype), *[None] * 6


class _Sums:
    """What a pass over the chunks adds up."""

    def __init__(self, states: Tensor, head_weight: Tensor, num_pairs: int, wants_grad: bool) -> None:
        device = states.device
        self.states, self.weight = states, head_weight.to(states.dtype)
        self.wants_grad = wants_grad
        self.grad_states = torch.zeros_like(states) if wants_grad else states
        self.grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if wants_grad else head_weight
        self.total = torch.zeros((), device=device)
        self.losses, self.overlaps = torch.zeros(num_pairs, device=device), torch.zeros(num_pairs, device=device)
        self.hits = torch.zeros(num_pairs, dtype=torch.bool, device=device)
        self.covered = torch.zeros((), dtype=torch.int64, device=device)
        self.scratch = Scratch(device)


class Scratch:
    """Memory that all chunks share: fresh pages cost as much as what is written to them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._buffers = device, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """The buffer of this name, which holds anything."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._buffers[name][:size].view(shape)


def _add_chunk(
    sums: _Sums, part: slice, state: Tensor, own: Tensor, teacher: "TeacherChunk", weight_fn: PairWeightFn
) -> None:
    """Cross-entropy of a chunk's m pairs; `state` (m,) their rows of the states, `own` (m,) their rows of the teacher.

    The gradient of a pair's loss is w (q - p). The p half is the same at all steps: sum_v p(v) z(v) = (p W) . h, so
    p W is multiplied once per position and never subtracted from a [m, D] matrix. The pairs' logits are one product,
    and so is each half of the backward, in which the positions' p lie behind the pairs' q:

        block   q | p          (m + C, D)
    """
    dtype, weight, num_pairs = sums.states.dtype, sums.weight, len(state)
    rows = sums.states[pad_index(state)]  # (m', H)
    num_rows, (num_positions, draft_vocab) = len(rows), teacher.logits.shape
    if dtype == torch.float32:
        z = q = product(rows, weight)
        p = teacher.probs
    else:  # bf16: the kernel of softmax computes in fp32 and rounds its result
        block = sums.scratch("block", num_rows + num_positions, draft_vocab, dtype=dtype)
        z = q = torch.mm(rows, weight.T, out=block[:num_rows])
        p = teacher.write_probs(block[num_rows:])
    h = rows[:num_pairs]
    taught = product(p, weight.T).float()[own]  # (m, H)
    highest, covered = z[:num_pairs].amax(-1), teacher.covered[own]
    sums.hits[part] = is_argmax(z[:num_pairs], highest, teacher.argmax[own]) & covered
    torch.softmax(z, -1, out=q)
    lse = highest.float() - q[:num_pairs].amax(-1).float().log()
    losses = lse - (taught * h).sum(-1)
    weights = weight_fn(lambda: _chosen(q[:num_pairs], teacher, own)) * covered
    sums.total += (losses * weights).sum()
    sums.losses[part] = losses * covered
    if not sums.wants_grad:
        sums.overlaps[part] = _overlap(q[:num_pairs], teacher, own)
        return
    grads = product(q, weight.T)[:num_pairs].float().sub_(taught).mul_(weights[:, None])
    sums.grad_states[state] = grads.to(dtype)
    right = h * weights[:, None]  # (m, H) fp32
    of_positions = torch.zeros(num_positions, right.shape[1], device=right.device).index_add_(0, own, right)
    right = F.pad(right, (0, 0, 0, num_rows - num_pairs))
    if dtype == torch.float32:
        sums.grad_weight.addmm_(q.T, right)
        sums.grad_weight.addmm_(p.T, of_positions, alpha=-1)
        return
    add_product(sums.grad_weight, block, torch.cat((right, -of_positions)).to(dtype), sums.scratch)


def add_product(total: Tensor, left: Tensor, right: Tensor, scratch: Scratch) -> None:
    """Add left.T @ right, of 16-bit numbers (R, C) and (R, X), to `total` (C, X) float32."""
    if total.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
        return
    for part, columns in zip(total.split(WEIGHT_ROWS), left.split(WEIGHT_ROWS, dim=1), strict=True):
        made = scratch("weight", *part.shape, dtype=left.dtype)
        part += torch.mm(columns.T, right, out=made)  # adding makes an fp32 copy of the part


def _chosen(q: Tensor, teacher: "TeacherChunk", own: Tensor) -> Tensor:
    """(m,) probability the draft gives the target's choice, 0 where that is no draft token."""
    choice = teacher.argmax.clamp(max=q.shape[-1] - 1)[own, None]
    return q.gather(1, choice)[:, 0].float() * teacher.covered[own]


def _overlap(q: Tensor, teacher: "TeacherChunk", own: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)) with p the target's full distribution: (m,)."""
    return torch.minimum((teacher.probs * teacher.mass[:, None])[own], q).sum(-1, dtype=torch.float32)


@dataclass(frozen=True)
class TeacherChunk:
    """The target at C positions, restricted to the draft vocabulary."""

    logits: Tensor  # (C, D) of the draft vocabulary, as the target's head made them
    argmax: Tensor  # (C,) index into the draft vocabulary of the target's argmax; meaningless where not covered
    covered: Tensor  # (C,) bool: the target's argmax is a draft token
    logsumexp: Callable[[], Tensor]  # (C,) of all logits

    @classmethod
    def of(
        cls, logits: Tensor, argmax: Tensor, logsumexp: Callable[[], Tensor], draft_ids: Tensor, t2d: Tensor
    ) -> "TeacherChunk":
        """logits (C, D) of the draft vocabulary; argmax (C,) target ids."""
        return cls(logits, torch.searchsorted(draft_ids, argmax), t2d[argmax], logsumexp)

    @cached_property
    def probs(self) -> Tensor:
        """(C, D) fp32, sums to 1."""
        return self.logits.float().softmax(-1)

    def write_probs(self, out: Tensor) -> Tensor:
        """`probs` into out (C, D), rounded to its dtype."""
        if out.dtype == self.logits.dtype:
            return torch.softmax(self.logits, -1, out=out)
        return out.copy_(self.probs)

    @cached_property
    def mass(self) -> Tensor:
        """(C,) share of the full distribution inside the draft vocabulary."""
        return torch.exp(self.logits.float().logsumexp(-1) - self.logsumexp())


def pairs_per_chunk(draft_vocab_size: int, vocab_size: int, device_type: str, *, steps: int, short: bool) -> int:
    """Pairs whose matrices fit CHUNK_BYTES, with those of their positions, each with so many steps.

    short: the teacher's logits are those of the draft vocabulary alone.
    """
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    max_pairs = budget // pair_bytes(draft_vocab_size, vocab_size, steps=steps, short=short)
    return max_pairs // MULTIPLE * MULTIPLE if max_pairs >= MULTIPLE else max(16, max_pairs)


def pair_bytes(draft_vocab_size: int, vocab_size: int, *, steps: int, short: bool) -> int:
    """What one pair of a chunk takes, in fp32: its distribution, and its part of its position's teacher."""
    return 4 * draft_vocab_size + (3 * 4 * draft_vocab_size + (0 if short else 4 * vocab_size)) // steps


def dense_loss(
    states: Sequence[Tensor],
    head_weight: Tensor,
    teacher: Teacher,
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> Tensor:
    """The same loss from whole matrices, all V logits of the target among them, by autograd; for tests."""
    chunk = dataclasses.replace(teacher, summary=None).read(alignment.positions, draft_ids, t2d)
    pairs, flat = alignment.pairs, torch.cat(list(states))
    log_q = (flat[pairs.state] @ head_weight.T).float().log_softmax(-1)  # (M, D)
    p, covered = chunk.probs[pairs.place], chunk.covered[pairs.place]
    choice = chunk.argmax.clamp(max=len(draft_ids) - 1)[pairs.place, None]
    confidence = log_q.detach().exp().gather(1, choice)[:, 0] * covered
    everything = slice(0, len(pairs.ends)), slice(0, len(p))
    weights = PairWeights(alignment, settings).of(*everything, lambda: confidence) * covered
    loss = -(p * log_q).sum(-1)
    return (loss * weights).sum()
