"""The TTT loss: head, teacher and gradient in one pass over chunks of teacher positions.

    loss = sum_k step_weight_k * mean_rows( -sum_v p(v) log q_k(v) )

p is the target's softmax restricted to the draft vocabulary; a position counts only where the target's own argmax is a
draft token. The teacher depends on the position alone, so each chunk computes its logits once and serves all K steps:
those of the draft vocabulary where the record says what the rest would (`TeacherSummary`), else all V. Logits of the
draft are turned into their gradient in place and multiplied out before the next chunk, so neither [N, V] teacher logits
nor K x [N, D] draft logits ever exist, and the backward is two multiplications by the incoming gradient.

`dense_loss` is the slow twin: whole matrices and autograd.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fledge.draft.position_weights import averaging_weights, dynamic_weights, fixed_weights
from fledge.draft.products import product
from fledge.draft.ttt import Alignment
from fledge.target.record import TeacherSummary

# P taught positions, C chunk of them, K steps, S active rows, D draft vocab, V target vocab

# Memory for one chunk's matrices: large enough for full-speed products, small beside the activations.
CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
Kind = Literal["kl", "lk"]
Average = Literal["sequence", "token"]
PositionWeights = Literal["fixed", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    kind: Kind = "kl"
    """kl: cross-entropy to the target. lk: lambda * KL + (1 - lambda) * TV with lambda = exp(-eta * acceptance)."""
    position_weights: PositionWeights = "fixed"
    """fixed: step_decay ** k. dynamic: the share of a row's expected accept length that lies at step k or deeper."""
    step_decay: float = 0.8
    """Fixed weight of TTT step k is step_decay ** k."""
    dynamic_floor: float = 0.5
    """Least confidence that dynamic weights assume of a step."""
    average: Average = "sequence"
    """Mean within each sequence, then over sequences; or over all tokens alike."""
    lk_eta: float = 3.0


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
    trained: Tensor  # (K,) rows that were asked
    hits: Tensor  # (K,) rows whose top-1 is the target's argmax; targets outside the draft vocabulary are misses
    prefix_hits: Tensor  # (K,) rows right at this step and at every earlier one
    overlap: Tensor  # (K,) summed sum_v min(p(v), q(v)), the acceptance at T = 1; under KL only without gradient
    covered: Tensor  # () positions whose target argmax is a draft token
    positions: Tensor  # ()


def ttt_loss(
    states: Tensor,
    head_weight: Tensor,
    teacher: Teacher,
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> LossOutput:
    """Loss of one batch.

    states (K, S, H) normed draft states; head_weight (D, H) the draft's lm_head; draft_ids (D,) target ids of the
    draft vocabulary; t2d (V,) bool.
    """
    device_type = states.device.type
    if torch.is_autocast_enabled(device_type):
        states = states.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):  # dtypes are chosen here: states' for the head, fp32 for the rest
        confidence = None
        if settings.position_weights == "dynamic":
            confidence = read_confidence(states, head_weight, teacher, draft_ids, t2d, alignment)
        weights = row_weights(alignment, settings, confidence)
        results = _FusedLoss.apply(
            states, head_weight, teacher, draft_ids, t2d, alignment, settings, weights, torch.is_grad_enabled()
        )
    loss, step_loss, hits, overlap, covered = results
    trained = alignment.trained
    matrix = hits.new_zeros(states.shape[:2], dtype=torch.bool)  # (K, S)
    steps = torch.arange(len(trained), device=trained.device)[:, None].expand_as(trained)
    matrix[steps[trained], alignment.row_index[trained]] = hits[trained]
    prefix = matrix.cummin(dim=0).values
    return LossOutput(
        loss=loss,
        step_loss=step_loss,
        trained=trained.sum(1),
        hits=hits.sum(1),
        prefix_hits=prefix.sum(1),
        overlap=overlap,
        covered=covered,
        positions=torch.tensor(len(alignment.positions), device=states.device),
    )


def row_weights(alignment: Alignment, settings: LossSettings, confidence: Tensor | None = None) -> Tensor:
    """(K, P) weight of position p's row at step k: the step's weight over the rows it is averaged with."""
    averaging = averaging_weights(alignment, settings.average)
    if settings.position_weights == "fixed":
        return averaging * fixed_weights(alignment, settings.step_decay)
    assert confidence is not None
    return averaging * dynamic_weights(alignment, confidence, settings.dynamic_floor)


@torch.no_grad()
def read_confidence(
    states: Tensor, head_weight: Tensor, teacher: Teacher, draft_ids: Tensor, t2d: Tensor, alignment: Alignment
) -> Tensor:
    """(K, P) probability the draft gives the target's choice: a pass of its own over the head, forward only."""
    found = torch.zeros(alignment.row_index.shape, device=states.device)
    weight = head_weight.to(states.dtype)
    per_chunk = chunk_size(len(states), len(draft_ids), len(t2d), states.device.type, short=teacher.is_short)
    for start in range(0, len(alignment.positions), per_chunk):
        part = slice(start, start + per_chunk)
        chunk = teacher.read(alignment.positions[part], draft_ids, t2d)
        choice = chunk.argmax.clamp(max=len(draft_ids) - 1)[:, None]
        for step in range(len(states)):
            index = alignment.row_index[step, part]
            z = (states[step, index.clamp_min(0)] @ weight.T).float()
            chosen = (z.gather(1, choice)[:, 0] - z.logsumexp(-1)).exp()
            found[step, part] = chosen * chunk.covered * (index >= 0)
    return found


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, teacher: Teacher, draft_ids: Tensor, t2d: Tensor,
        alignment: Alignment, settings: LossSettings, weights: Tensor, wants_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        sums = _Sums(states, head_weight, alignment, wants_grad)
        per_chunk = chunk_size(len(states), len(draft_ids), len(t2d), states.device.type, short=teacher.is_short)
        rows = _kl_rows if settings.kind == "kl" else _lk_rows
        for start in range(0, len(alignment.positions), per_chunk):
            part = slice(start, start + per_chunk)
            chunk = teacher.read(alignment.positions[part], draft_ids, t2d)
            rows(sums, part, chunk, weights[:, part] * chunk.covered, settings)
            sums.covered += chunk.covered.sum()
        if wants_grad:
            ctx.save_for_backward(sums.grad_states, sums.grad_weight)
        ctx.head_dtype = head_weight.dtype
        outputs = (sums.step_loss, sums.hits, sums.overlap, sums.covered)
        ctx.mark_non_differentiable(*outputs)
        return sums.total, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        # In place: these are read once. A second backward through the same loss is refused by autograd's version check.
        return grad_states.mul_(grads[0]), grad_weight.mul_(grads[0]).to(ctx.head_dtype), *[None] * 7


class _Sums:
    """What a pass over the chunks adds up."""

    def __init__(self, states: Tensor, head_weight: Tensor, alignment: Alignment, wants_grad: bool) -> None:
        num_steps, device = len(states), states.device
        self.states, self.weight, self.alignment = states, head_weight.to(states.dtype), alignment
        self.wants_grad = wants_grad
        self.grad_states = torch.zeros_like(states) if wants_grad else states
        self.grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if wants_grad else head_weight
        self.total = torch.zeros((), device=device)
        self.step_loss, self.overlap = torch.zeros(num_steps, device=device), torch.zeros(num_steps, device=device)
        self.hits = torch.zeros(alignment.row_index.shape, dtype=torch.bool, device=device)
        self.covered = torch.zeros((), dtype=torch.int64, device=device)
        self.rooms: dict[str, Tensor] = {}

    def row_states(self, step: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For a chunk of positions at one step: (C, H) states, their (C,) row numbers, and which are real."""
        index = self.alignment.row_index[step, part]
        real = index >= 0
        index = index.clamp_min(0)
        return self.states[step, index], index, real

    def add_row_grads(self, step: int, index: Tensor, real: Tensor, grad: Tensor) -> None:
        self.grad_states[step, index[real]] = grad[real].to(self.grad_states.dtype)

    def room(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory that all chunks share: fresh pages cost as much as what is written to them."""
        size = math.prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = torch.empty(size, dtype=dtype, device=self.states.device)
        return self.rooms[name][:size].view(shape)


def _kl_rows(sums: _Sums, part: slice, teacher: "TeacherChunk", weights: Tensor, settings: LossSettings) -> None:
    """Cross-entropy of one chunk at all steps.

    The gradient of a row's loss is w (q - p). The p half is the same for all steps: sum_v p(v) z(v) = (p W) . h, so p W
    is multiplied once per chunk and never subtracted from a [C, D] matrix. The steps' logits are one product, and so is
    each half of the backward; their distributions take the logits' place in memory, in bf16 with p behind them:

        block   q_0 | q_1 | .. | q_{K-1} | p          (K + 1, C, D)
    """
    num_steps, dtype, weight = len(sums.states), sums.states.dtype, sums.weight
    num_rows, draft_vocab = teacher.probs.shape
    narrow = dtype != torch.float32
    chosen = [sums.row_states(step, part) for step in range(num_steps)]
    states = torch.stack([h for h, _, _ in chosen])  # (K, C, H)
    if narrow:
        block = sums.room("block", num_steps + 1, num_rows, draft_vocab, dtype=dtype)
        block[-1].copy_(teacher.probs)
        steps, p = block[:-1], block[-1]
        torch.mm(states.flatten(0, 1), weight.T, out=steps.view(-1, draft_vocab))
    else:
        steps, p = product(states.flatten(0, 1), weight).unflatten(0, (num_steps, num_rows)), teacher.probs
    taught = product(p, weight.T)  # (C, H)
    for step, (h, _, real) in enumerate(chosen):
        z = q = steps[step]
        if narrow:
            z = sums.room("logits", num_rows, draft_vocab, dtype=torch.float32).copy_(z)
            q = sums.room("q", num_rows, draft_vocab, dtype=torch.float32)
        highest = z.amax(-1)
        sums.hits[step, part] = _is_top(z, highest, teacher.argmax) & teacher.covered & real
        torch.softmax(z, -1, out=q)
        if narrow:
            steps[step].copy_(q)
        lse = highest - q.amax(-1).log()
        loss = lse - (taught.float() * h.float()).sum(-1)
        sums.total += (loss * weights[step]).sum()
        sums.step_loss[step] += loss[teacher.covered & real].sum()
        if not sums.wants_grad:
            sums.overlap[step] += _overlap(q, teacher)[real].sum()
    if not sums.wants_grad:
        return
    grads = product(steps.flatten(0, 1), weight.T).float().unflatten(0, (num_steps, num_rows))
    grads = (grads - taught.float()) * weights[..., None]
    weighted = states * weights[..., None]
    for step, (_, index, real) in enumerate(chosen):
        sums.add_row_grads(step, index, real, grads[step])
    if narrow:
        right = torch.cat((weighted, -weighted.sum(0, keepdim=True))).to(dtype)
        sums.grad_weight += block.flatten(0, 1).T @ right.flatten(0, 1)
    else:
        sums.grad_weight.addmm_(steps.flatten(0, 1).T, weighted.flatten(0, 1))
        sums.grad_weight.addmm_(p.T, weighted.sum(0), alpha=-1)


def _is_top(z: Tensor, highest: Tensor, wanted: Tensor) -> Tensor:
    """(C,) is `wanted` the argmax of its row of z (C, D)? On a CPU a row's maximum is far cheaper than its place."""
    wanted = wanted.clamp(max=z.shape[-1] - 1)
    if z.device.type != "cpu":
        return z.argmax(-1) == wanted
    found = z.gather(1, wanted[:, None])[:, 0] == highest
    rows = found.nonzero()[:, 0]
    found[rows] = z[rows].max(-1).indices == wanted[rows]  # of equal maxima, one
    return found


def _lk_rows(sums: _Sums, part: slice, teacher: "TeacherChunk", weights: Tensor, settings: LossSettings) -> None:
    """LK-hybrid of one chunk at all steps; TV = 1 - sum min(p, q), so only entries with q < p move it."""
    dtype, weight, p = sums.states.dtype, sums.weight, teacher.probs
    entropy = -torch.special.xlogy(p, p).sum(-1)
    for step in range(len(sums.states)):
        h, index, real = sums.row_states(step, part)
        z = (h @ weight.T).float()
        lse = z.logsumexp(-1, keepdim=True)
        sums.hits[step, part] = (z.argmax(-1) == teacher.argmax) & teacher.covered & real
        cross_entropy = lse[:, 0] - (p * z).sum(-1)
        q = z.sub_(lse).exp_()
        tv = 1 - torch.minimum(p, q).sum(-1)
        share = torch.exp(-settings.lk_eta * (1 - tv))
        loss = share * (cross_entropy - entropy) + (1 - share) * tv
        sums.total += (loss * weights[step]).sum()
        sums.step_loss[step] += cross_entropy[teacher.covered & real].sum()
        sums.overlap[step] += _overlap(q, teacher)[real].sum()
        if sums.wants_grad:
            below = (q < p) * q
            grad_tv = q * below.sum(-1, keepdim=True) - below
            grad = (share[:, None] * (q - p) + (1 - share)[:, None] * grad_tv).mul_(weights[step, :, None]).to(dtype)
            sums.add_row_grads(step, index, real, grad @ weight)
            sums.grad_weight += grad.T @ h


def _overlap(q: Tensor, teacher: "TeacherChunk") -> Tensor:
    """sum_v min(p(v), q(v)) with p the target's full distribution: (C,)."""
    return torch.minimum(teacher.probs * teacher.mass[:, None], q).sum(-1)


@dataclass(frozen=True)
class TeacherChunk:
    """The target at C positions, restricted to the draft vocabulary."""

    probs: Tensor  # (C, D) fp32, sums to 1
    argmax: Tensor  # (C,) index into the draft vocabulary of the target's argmax; meaningless where not covered
    covered: Tensor  # (C,) bool: the target's argmax is a draft token
    inside: Tensor  # (C, D) fp32 logits of the draft vocabulary
    logsumexp: Callable[[], Tensor]  # (C,) of all logits

    @classmethod
    def of(
        cls, inside: Tensor, argmax: Tensor, logsumexp: Callable[[], Tensor], draft_ids: Tensor, t2d: Tensor
    ) -> "TeacherChunk":
        """inside (C, D) logits of the draft vocabulary; argmax (C,) target ids."""
        inside = inside.float()
        return cls(inside.softmax(-1), torch.searchsorted(draft_ids, argmax), t2d[argmax], inside, logsumexp)

    @cached_property
    def mass(self) -> Tensor:
        """(C,) share of the full distribution inside the draft vocabulary."""
        return torch.exp(self.inside.logsumexp(-1) - self.logsumexp())


def chunk_size(num_steps: int, draft_vocab_size: int, vocab_size: int, device_type: str, *, short: bool) -> int:
    """Teacher positions per chunk: the teacher's logits and the draft's distributions at all steps fit CHUNK_BYTES.

    short: the teacher's logits are those of the draft vocabulary alone.
    """
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // position_bytes(
        num_steps, draft_vocab_size, vocab_size, short=short
    )
    return rows // 64 * 64 if rows >= 64 else max(16, rows)  # odd numbers of rows halve the speed of bf16 products


def position_bytes(num_steps: int, draft_vocab_size: int, vocab_size: int, *, short: bool) -> int:
    """What one position of a chunk takes, in fp32."""
    return (0 if short else 4 * vocab_size) + 4 * draft_vocab_size * (num_steps + 5)


def dense_loss(
    states: Tensor,
    head_weight: Tensor,
    teacher: Teacher,
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> Tensor:
    """The same loss from whole matrices, all V logits of the target among them, by autograd; for tests."""
    chunk = dataclasses.replace(teacher, summary=None).read(alignment.positions, draft_ids, t2d)
    confidence = None
    if settings.position_weights == "dynamic":
        rows = alignment.row_index.clamp_min(0)
        q = torch.stack([(states[k, rows[k]] @ head_weight.T).float().softmax(-1) for k in range(len(states))])
        choice = chunk.argmax.clamp(max=len(draft_ids) - 1).expand(len(states), -1)
        confidence = q.gather(-1, choice[..., None])[..., 0].detach() * chunk.covered
    weights = row_weights(alignment, settings, confidence) * chunk.covered
    total = states.new_zeros(())
    for step in range(len(states)):
        asked = alignment.trained[step].nonzero()[:, 0]
        log_q = (states[step, alignment.row_index[step, asked]] @ head_weight.T).float().log_softmax(-1)
        p = chunk.probs[asked]
        loss = -(p * log_q).sum(-1)
        if settings.kind == "lk":
            overlap = torch.minimum(p, log_q.exp()).sum(-1)
            share = torch.exp(-settings.lk_eta * overlap.detach())
            loss = share * (loss + torch.special.xlogy(p, p).sum(-1)) + (1 - share) * (1 - overlap)
        total = total + (loss * weights[step, asked]).sum()
    return total
