"""The TTT loss: head, teacher and gradient in one pass over chunks of rows, each with all its steps.

    loss = sum_k step_weight_k * mean_rows( -sum_v p(v) log q_k(v) )

p is the target's softmax restricted to the draft vocabulary; a position counts only where the target's own argmax is a
draft token. The teacher depends on the position alone, so a chunk computes its positions' logits once for all K steps
(those that two chunks share, K - 1, twice): of the draft vocabulary where the record says what the rest would
(`TeacherSummary`), else all V. As a chunk has all steps of its rows, weights that depend on how sure the draft is need
no pass of their own. Logits of the draft are turned into their gradient in place and multiplied out before the next
chunk, so neither [N, V] teacher logits nor K x [N, D] draft logits ever exist, and the backward is two multiplications
by the incoming gradient.

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
from fledge.drafters.position_weights import averaging_weights, dynamic_weights
from fledge.drafters.products import FULL, product
from fledge.target.record import TeacherSummary

# P taught positions, C chunk of them, K steps, M pairs of a position and a step, m chunk of them, S active rows
# D draft vocab, V target vocab

# Memory for one chunk's matrices: large enough for full-speed products, small beside the activations.
CHUNK_BYTES = {"cpu": 41 * 2**19, "cuda": 512 * 2**20}
PART = 1024  # rows of the head whose 16-bit gradients are there at a time
Kind = Literal["kl", "lk"]
Average = Literal["sequence", "token"]
PositionWeights = Literal["fixed", "dynamic"]
Weigh = Callable[[Callable[[], Tensor]], Tensor]
"""(m,) weights of a chunk's pairs, from the draft's (m,) probability of the target's choice if that is asked for."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised."""

    kind: Kind = "kl"
    """kl: cross-entropy to the target. lk: lambda * KL + (1 - lambda) * TV with lambda = exp(-eta * acceptance)."""
    position_weights: PositionWeights = "dynamic"
    """dynamic: the share of a row's expected accept length that lies at step k or deeper. fixed: step_decay ** k."""
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
        positions=torch.tensor(len(alignment.positions), device=flat.device),
    )


class PairWeights:
    """How much each pair counts: the average it is part of, and its step's weight, fixed or dynamic."""

    def __init__(self, alignment: Alignment, settings: LossSettings) -> None:
        self.pairs, self.settings = alignment.pairs, settings
        self.known = averaging_weights(alignment, settings.average)  # (M,)
        if settings.position_weights == "fixed":
            self.known = self.known * settings.step_decay**self.pairs.step

    def of(self, rows: slice, part: slice, confidence: Callable[[], Tensor]) -> Tensor:
        """(m,) weights of the pairs `part`, which are all those of `rows`; confidence: see `dynamic_weights`."""
        if self.settings.position_weights == "fixed":
            return self.known[part]
        row, asked = self.pairs.row[part] - rows.start, self.pairs.asked[:, rows]
        floor = self.settings.dynamic_floor
        return self.known[part] * dynamic_weights(confidence(), row, self.pairs.step[part], asked, floor)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, teacher: Teacher, draft_ids: Tensor, t2d: Tensor,
        alignment: Alignment, settings: LossSettings, wants_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pairs, weights = alignment.pairs, PairWeights(alignment, settings)
        sums = _Sums(states, head_weight, len(pairs.place), wants_grad)
        rows = _kl_rows if settings.kind == "kl" else _lk_rows
        steps = max(1, round(len(pairs.place) / max(1, len(alignment.positions))))
        most = pairs_per_chunk(len(draft_ids), len(t2d), states.device.type, steps=steps, short=teacher.is_short)
        most = max(1, most // (6 if settings.kind == "lk" else 1 if wants_grad else 3))
        for chunk in pairs.chunks(most, len(alignment.positions)):
            positions = alignment.positions[chunk.places]
            taught = teacher.read(_filled(positions), draft_ids, t2d)
            own = pairs.place[chunk.pairs] - chunk.places.start
            weigh = functools.partial(weights.of, chunk.rows, chunk.pairs)
            rows(sums, chunk.pairs, pairs.state[chunk.pairs], own, taught, weigh, settings)
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
        self.rooms: dict[str, Tensor] = {}

    def room(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory that all chunks share: fresh pages cost as much as what is written to them."""
        size = math.prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = torch.empty(size, dtype=dtype, device=self.states.device)
        return self.rooms[name][:size].view(shape)


def _kl_rows(
    sums: _Sums, part: slice, state: Tensor, own: Tensor, teacher: "TeacherChunk", weigh: Weigh, _: LossSettings
) -> None:
    """Cross-entropy of a chunk's m pairs; `state` (m,) their rows of the states, `own` (m,) their rows of the teacher.

    The gradient of a pair's loss is w (q - p). The p half is the same at all steps: sum_v p(v) z(v) = (p W) . h, so
    p W is multiplied once per position and never subtracted from a [m, D] matrix. The pairs' logits are one product,
    and so is each half of the backward, in which the positions' p lie behind the pairs' q:

        block   q | p          (m + C, D)
    """
    dtype, weight, num_pairs = sums.states.dtype, sums.weight, len(state)
    rows = sums.states[_filled(state)]  # (m', H)
    num_rows, (num_positions, draft_vocab) = len(rows), teacher.logits.shape
    if dtype == torch.float32:
        z = q = product(rows, weight)
        p = teacher.probs
    else:  # bf16: the kernel of softmax computes in fp32 and rounds its result
        block = sums.room("block", num_rows + num_positions, draft_vocab, dtype=dtype)
        z = q = torch.mm(rows, weight.T, out=block[:num_rows])
        p = teacher.write_probs(block[num_rows:])
    h = rows[:num_pairs]
    taught = product(p, weight.T).float()[own]  # (m, H)
    highest, covered = z[:num_pairs].amax(-1), teacher.covered[own]
    sums.hits[part] = _is_top(z[:num_pairs], highest, teacher.argmax[own]) & covered
    torch.softmax(z, -1, out=q)
    lse = highest.float() - q[:num_pairs].amax(-1).float().log()
    losses = lse - (taught * h).sum(-1)
    weights = weigh(lambda: _chosen(q[:num_pairs], teacher, own)) * covered
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
    else:
        right = torch.cat((right, -of_positions)).to(dtype)
        for total, columns in zip(sums.grad_weight.split(PART), block.split(PART, dim=1), strict=True):
            made = sums.room("weight", *total.shape, dtype=dtype)
            total += torch.mm(columns.T, right, out=made)  # adding makes an fp32 copy of the part


def _filled(index: Tensor) -> Tensor:
    """(m,) -> (m',) the next multiple of FULL, zeros behind: products of few different shapes.

    The library behind a CPU's products keeps what it made for every shape it has met.
    """
    return F.pad(index, (0, -len(index) % FULL))


def _is_top(z: Tensor, highest: Tensor, wanted: Tensor) -> Tensor:
    """(C,) is `wanted` the argmax of its row of z (C, D)? On a CPU a row's maximum is far cheaper than its place."""
    wanted = wanted.clamp(max=z.shape[-1] - 1)
    if z.device.type != "cpu":
        return z.argmax(-1) == wanted
    found = z.gather(1, wanted[:, None])[:, 0] == highest
    rows = found.nonzero()[:, 0]
    found[rows] = z[rows].max(-1).indices == wanted[rows]  # of equal maxima, one
    return found


def _lk_rows(
    sums: _Sums, part: slice, state: Tensor, own: Tensor, teacher: "TeacherChunk", weigh: Weigh,
    settings: LossSettings,
) -> None:  # fmt: skip
    """LK-hybrid of a chunk's m pairs; TV = 1 - sum min(p, q), so only entries with q < p move it."""
    weight, h = sums.weight, sums.states[state]
    p = teacher.probs[own]
    z = (h @ weight.T).float()
    lse = z.logsumexp(-1, keepdim=True)
    covered = teacher.covered[own]
    sums.hits[part] = (z.argmax(-1) == teacher.argmax[own]) & covered
    cross_entropy = lse[:, 0] - (p * z).sum(-1)
    q = z.sub_(lse).exp_()
    weights = weigh(lambda: _chosen(q, teacher, own)) * covered
    tv = 1 - torch.minimum(p, q).sum(-1)
    share = torch.exp(-settings.lk_eta * (1 - tv))
    loss = share * (cross_entropy + torch.special.xlogy(p, p).sum(-1)) + (1 - share) * tv
    sums.total += (loss * weights).sum()
    sums.losses[part] = cross_entropy * covered
    sums.overlaps[part] = _overlap(q, teacher, own)
    if sums.wants_grad:
        below = (q < p) * q
        grad_tv = q * below.sum(-1, keepdim=True) - below
        grad = (share[:, None] * (q - p) + (1 - share)[:, None] * grad_tv).mul_(weights[:, None]).to(h.dtype)
        sums.grad_states[state] = grad @ weight
        sums.grad_weight += grad.T @ h


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
    most = budget // pair_bytes(draft_vocab_size, vocab_size, steps=steps, short=short)
    return most // FULL * FULL if most >= FULL else max(16, most)


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
    if settings.kind == "lk":
        overlap = torch.minimum(p, log_q.exp()).sum(-1)
        share = torch.exp(-settings.lk_eta * overlap.detach())
        loss = share * (loss + torch.special.xlogy(p, p).sum(-1)) + (1 - share) * (1 - overlap)
    return (loss * weights).sum()
