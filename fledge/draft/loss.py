"""The TTT loss: head, teacher and gradient in one pass over chunks of teacher positions.

    loss = sum_k step_weight_k * mean_rows( -sum_v p(v) log q_k(v) )

p is the target's softmax restricted to the draft vocabulary; a position counts only where the target's own argmax is a
draft token. The teacher depends on the position alone, so each chunk computes `head(last_hidden)` once and serves all
K steps. Logits of the draft are turned into their gradient in place and multiplied out before the next chunk, so
neither [N, V] teacher logits nor K x [N, D] draft logits ever exist, and the backward is two multiplications by the
incoming gradient.

`dense_loss` is the slow twin: whole matrices and autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.draft.ttt import Alignment

# P taught positions, C chunk of them, K steps, S active rows, D draft vocab, V target vocab

CHUNK_BYTES = 128 * 2**20
Kind = Literal["kl", "lk"]
Average = Literal["sequence", "token"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    kind: Kind = "kl"
    """kl: cross-entropy to the target. lk: lambda * KL + (1 - lambda) * TV with lambda = exp(-eta * acceptance)."""
    step_decay: float = 0.8
    """Weight of TTT step k is step_decay ** k."""
    average: Average = "sequence"
    """Mean within each sequence, then over sequences; or over all tokens alike."""
    lk_eta: float = 3.0


@dataclass(frozen=True)
class LossOutput:
    """The loss to minimise and the sums behind every printed metric (so that ranks and steps can be added up)."""

    loss: Tensor  # () sum over sequences (or tokens); divide by the number of them in the whole optimisation step
    step_loss: Tensor  # (K,) summed over rows
    trained: Tensor  # (K,) rows that were asked
    hits: Tensor  # (K,) rows whose top-1 is the target's argmax; targets outside the draft vocabulary are misses
    prefix_hits: Tensor  # (K,) rows right at this step and at every earlier one
    overlap: Tensor  # (K,) summed sum_v min(p(v), q(v)) against the target's full distribution: acceptance at T = 1
    covered: Tensor  # () positions whose target argmax is a draft token
    positions: Tensor  # ()


def ttt_loss(
    states: Tensor,
    head_weight: Tensor,
    last_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> LossOutput:
    """Loss of one batch.

    states (K, S, H) normed draft states; head_weight (D, H) the draft's lm_head; last_hidden (N, H) and teacher_head
    give the target's logits; draft_ids (D,) target ids of the draft vocabulary; t2d (V,) bool.
    """
    weights, device_type = row_weights(alignment, settings), states.device.type
    if torch.is_autocast_enabled(device_type):
        states = states.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):  # dtypes are chosen here: states' for the head, fp32 for the rest
        results = _FusedLoss.apply(
            states, head_weight, last_hidden, teacher_head, draft_ids, t2d, alignment, settings, weights
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


def row_weights(alignment: Alignment, settings: LossSettings) -> Tensor:
    """(K, P) weight of position p's row at step k: the step's weight over the rows it is averaged with."""
    trained = alignment.trained
    num_steps = len(trained)
    step_weight = settings.step_decay ** torch.arange(num_steps, device=trained.device, dtype=torch.float32)
    if settings.average == "token" or not trained.numel():
        return trained * step_weight[:, None]
    per_document = trained.new_zeros((num_steps, int(alignment.document.max()) + 1), dtype=torch.float32)
    per_document.index_add_(1, alignment.document, trained.float())
    return trained * step_weight[:, None] / per_document[:, alignment.document].clamp_min(1)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, last_hidden: Tensor, teacher_head: Callable[[Tensor], Tensor],
        draft_ids: Tensor, t2d: Tensor, alignment: Alignment, settings: LossSettings, weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        num_steps, num_rows, size = states.shape
        weight = head_weight.to(states.dtype)
        wants_grad = any(ctx.needs_input_grad[:2])
        grad_states = torch.zeros_like(states) if wants_grad else None
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if wants_grad else None
        step_loss = states.new_zeros(num_steps, dtype=torch.float32)
        overlap = torch.zeros_like(step_loss)
        total, covered = step_loss.new_zeros(()), torch.zeros((), dtype=torch.int64, device=states.device)
        hits = torch.zeros(alignment.row_index.shape, dtype=torch.bool, device=states.device)
        chunk = chunk_size(num_steps, len(draft_ids), len(t2d))
        for start in range(0, len(alignment.positions), chunk):
            part = slice(start, start + chunk)
            teacher = read_teacher(teacher_head(last_hidden[alignment.positions[part]]), draft_ids, t2d)
            covered += teacher.covered.sum()
            step, column = alignment.trained[:, part].nonzero(as_tuple=True)  # (R,) pairs of this chunk
            rows = alignment.row_index[:, part][step, column]
            inputs = states[step, rows]
            row_weight = (weights[:, part][step, column] * teacher.covered[column]).float()
            loss, hit, alpha, grad = _rows(inputs @ weight.T, teacher, column, row_weight, settings, wants_grad)
            total += (loss * row_weight).sum()
            step_loss.index_add_(0, step, loss * teacher.covered[column])
            overlap.index_add_(0, step, alpha)
            hits[step, column + start] = hit
            if grad_states is not None and grad_weight is not None and grad is not None:
                grad = grad.to(states.dtype)
                grad_states[step, rows] = grad @ weight
                grad_weight += grad.T @ inputs
        if wants_grad:
            ctx.save_for_backward(grad_states, grad_weight)
        ctx.head_dtype = head_weight.dtype
        ctx.mark_non_differentiable(step_loss, hits, overlap, covered)
        return total, step_loss, hits, overlap, covered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grads[0], (grad_weight * grads[0]).to(ctx.head_dtype), *[None] * 7


@dataclass(frozen=True)
class TeacherChunk:
    """The target at C positions, restricted to the draft vocabulary."""

    probs: Tensor  # (C, D) fp32, sums to 1
    mass: Tensor  # (C,) fp32 share of the full distribution inside the draft vocabulary
    argmax: Tensor  # (C,) index into the draft vocabulary of the target's argmax; meaningless where not covered
    covered: Tensor  # (C,) bool: the target's argmax is a draft token


def read_teacher(logits: Tensor, draft_ids: Tensor, t2d: Tensor) -> TeacherChunk:
    """Full target logits (C, V) to the restricted distribution."""
    best = logits.argmax(-1)
    covered = t2d[best]
    inside = logits if len(draft_ids) == logits.shape[-1] else logits[:, draft_ids]
    inside = inside.float()
    inside_lse = inside.logsumexp(-1)
    mass = torch.exp(inside_lse - logits.float().logsumexp(-1))
    return TeacherChunk(torch.exp(inside - inside_lse[:, None]), mass, torch.searchsorted(draft_ids, best), covered)


def _rows(
    logits: Tensor, teacher: TeacherChunk, column: Tensor, row_weight: Tensor, settings: LossSettings, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, hit, overlap and gradient of R draft rows with logits (R, D), taught by teacher rows `column` (R,)."""
    z, p = logits.float(), teacher.probs[column]
    hit = (z.argmax(-1) == teacher.argmax[column]) & teacher.covered[column]
    lse = z.logsumexp(-1, keepdim=True)
    cross_entropy = lse[:, 0] - (p * z).sum(-1)
    q = z.sub_(lse).exp_()
    full_p = p * teacher.mass[column, None]
    alpha = torch.minimum(full_p, q).sum(-1)
    if settings.kind == "kl":
        grad = q.sub_(p).mul_(row_weight[:, None]) if wants_grad else None
        return cross_entropy, hit, alpha, grad
    below = (q < p).float() * q  # TV = 1 - sum min(p, q): only entries where q < p move it
    tv = 1 - torch.minimum(p, q).sum(-1)
    share = torch.exp(-settings.lk_eta * (1 - tv))
    entropy = -torch.special.xlogy(p, p).sum(-1)
    loss = share * (cross_entropy - entropy) + (1 - share) * tv
    if not wants_grad:
        return loss, hit, alpha, None
    grad_tv = q * below.sum(-1, keepdim=True) - below
    grad = share[:, None] * (q - p) + (1 - share)[:, None] * grad_tv
    return loss, hit, alpha, grad * row_weight[:, None]


def chunk_size(num_steps: int, draft_vocab_size: int, vocab_size: int) -> int:
    """Teacher positions per chunk: fp32 teacher logits and three copies of the draft's fit CHUNK_BYTES."""
    per_position = 4 * (2 * vocab_size + 3 * num_steps * draft_vocab_size)
    return max(16, CHUNK_BYTES // per_position)


def dense_loss(
    states: Tensor,
    head_weight: Tensor,
    last_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    draft_ids: Tensor,
    t2d: Tensor,
    alignment: Alignment,
    settings: LossSettings,
) -> Tensor:
    """The same loss from whole matrices, differentiated by autograd; for tests."""
    teacher = read_teacher(teacher_head(last_hidden[alignment.positions]), draft_ids, t2d)
    weights = row_weights(alignment, settings) * teacher.covered
    total = states.new_zeros(())
    for step in range(len(states)):
        asked = alignment.trained[step].nonzero()[:, 0]
        log_q = (states[step, alignment.row_index[step, asked]] @ head_weight.T).float().log_softmax(-1)
        p = teacher.probs[asked]
        loss = -(p * log_q).sum(-1)
        if settings.kind == "lk":
            overlap = torch.minimum(p, log_q.exp()).sum(-1)
            share = torch.exp(-settings.lk_eta * overlap.detach())
            loss = share * (loss + torch.special.xlogy(p, p).sum(-1)) + (1 - share) * (1 - overlap)
        total = total + (loss * weights[step, asked]).sum()
    return total
