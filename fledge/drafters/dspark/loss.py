"""The loss of block drafts: head, teacher and gradient in one pass over chunks of blocks.

    loss = sum over supervised drafts of  weight * (ce * CE + tv * TV)  +  BCE of the confidence head
    CE   = - sum_v p(v) log q(v)                       kl: less the entropy of p, which has no gradient
    TV   = 1 - sum_v min(P(v), q(v))                   P: the target's distribution over its whole vocabulary,
                                                       p: the same, restricted to the draft's

The weight of a draft is exp(-k / DECAY), or dynamic: what it adds to the accept length that the draft expects
(`fledge.drafters.position_weights`; D-PACE, arXiv 2605.18810). Weights are averaged over the drafts of a document. CE
and TV count where the target's own argmax is a draft token. The confidence head learns 1 - TV of every draft, with
fixed weights, and its gradient reaches the layers.

The head is the target's and frozen, the Markov head is not: logits = states W^T + embeddings W2^T. A chunk's logits are
turned into their gradient in place and multiplied out before the next one. Neighbouring blocks have teacher positions
in common, and those of a chunk are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.drafters.batch import sent
from fledge.drafters.cpu_kernels import MULTIPLE, is_argmax, pad_index, product
from fledge.drafters.dspark.blocks import Blocks
from fledge.drafters.loss import (
    CHUNK_BYTES,
    Average,
    LossOutput,
    PositionWeights,
    Scratch,
    Teacher,
    TeacherChunk,
    add_product,
)
from fledge.drafters.position_weights import CONFIDENCE_FLOOR, dynamic_weights

# b blocks, K drafts of a block, M supervised pairs of a block and a draft, m of a chunk, C teacher positions of a chunk
# H hidden, r Markov rank, D draft vocab, V target vocab

BlockLossKind = Literal["ce", "ce+tv", "kl"]
MIX = {"ce": (1.0, 0.0), "ce+tv": (0.1, 0.9), "kl": (1.0, 0.0)}  # of CE and TV
DECAY = 4.0  # drafts until a fixed weight has fallen to 1 / e
LEAST_PAIRS = {"cpu": 128, "cuda": 512}  # of a chunk
TINY = 1e-30  # the least mass to divide by; a pair with less of it does not count


@dataclass(frozen=True, kw_only=True)
class BlockLossSettings:
    """What is minimised."""

    kind: BlockLossKind = "ce+tv"
    position_weights: PositionWeights = "dynamic"
    average: Average = "sequence"


class BlockPairs(NamedTuple):
    """The supervised drafts, block by block."""

    block: Tensor  # (M,) int64 ascending
    draft: Tensor  # (M,) int64
    position: Tensor  # (M,) int64 row of the batch whose target distribution teaches; on the host
    ends: Sequence[int]  # b numbers: pairs of the blocks up to each, itself included
    supervised: Tensor  # (b, K) bool
    average: Tensor  # (M,) fp32 what a pair counts for in the mean
    num_blocks: int

    @classmethod
    def of(cls, blocks: Blocks, average: str, device: torch.device) -> "BlockPairs":
        block, draft = blocks.supervised.nonzero().T
        document = blocks.document[block]
        number = torch.zeros(len(blocks.candidates)).index_add_(0, document, torch.ones(len(block)))
        share = 1 / number[document]
        if average == "token":
            share = share * blocks.candidates[document]
        position = blocks.rows[block] + draft
        ends = blocks.supervised.sum(1).cumsum(0).tolist()
        return cls(
            sent(block, device), sent(draft, device), position, ends, sent(blocks.supervised, device),
            sent(share, device), len(blocks),
        )  # fmt: skip

    def fixed(self) -> Tensor:
        """(M,) fixed weights."""
        return torch.exp(-self.draft / DECAY) * self.average

    def weights(self, chunk: slice, blocks: slice, settings: BlockLossSettings, confidence: Tensor) -> Tensor:
        """(m,) weights of a chunk's pairs; confidence (m,): the draft's probability of the target's choice."""
        if settings.position_weights == "fixed":
            return self.fixed()[chunk]
        row = self.block[chunk] - blocks.start
        dynamic = dynamic_weights(
            confidence, row, self.draft[chunk], self.supervised[blocks].T, CONFIDENCE_FLOOR
        )  # fmt: skip
        return dynamic * self.average[chunk]


class BlockHeads(NamedTuple):
    """What turns states into logits, and the vocabulary they are over."""

    weight: Tensor  # (D, H) frozen
    markov: Tensor | None  # (D, r)
    draft_ids: Tensor  # (D,)
    t2d: Tensor  # (V,)


def block_loss(
    states: Tensor, embeddings: Tensor | None, confidence: Tensor | None, heads: BlockHeads, teacher: Teacher,
    blocks: Blocks, settings: BlockLossSettings,
) -> LossOutput:  # fmt: skip
    """Loss of one batch.

    states (b, K, H) normed states of the drafting slots; embeddings (b, K, r) Markov embeddings of the tokens before;
    confidence (b, K) logits of acceptance.
    """
    device, (num_blocks, num_drafts) = states.device, states.shape[:2]
    pairs = BlockPairs.of(blocks, settings.average, device)
    flat = states[pairs.block, pairs.draft]
    if torch.is_autocast_enabled(device.type):
        flat = flat.to(torch.get_autocast_dtype(device.type))
    before = None if embeddings is None else embeddings[pairs.block, pairs.draft].to(flat.dtype)
    with torch.autocast(device.type, enabled=False):  # dtypes are chosen here: states' for the head, fp32 for the rest
        results = _FusedBlockLoss.apply(
            flat, before, heads.markov, heads, teacher, pairs, settings, torch.is_grad_enabled()
        )  # fmt: skip
        loss, losses, hits, overlaps, covered = results
        if confidence is not None:
            logits = confidence[pairs.block, pairs.draft].float()
            wrong = F.binary_cross_entropy_with_logits(logits, overlaps, reduction="none")
            loss = loss + (wrong * pairs.fixed()).sum()

    def by_draft(values: Tensor) -> Tensor:
        return values.new_zeros(num_drafts).index_add_(0, pairs.draft, values)

    right = hits.new_zeros((num_blocks, num_drafts), dtype=torch.bool)
    right[pairs.block, pairs.draft] = hits
    return LossOutput(
        loss=loss,
        step_loss=by_draft(losses),
        trained=pairs.supervised.sum(0),
        hits=by_draft(hits.long()),
        prefix_hits=right.cummin(dim=1).values.sum(0),
        overlap=by_draft(overlaps),
        covered=(covered & (pairs.draft == 0)).sum(),
        positions=torch.full((), num_blocks, device=device),
    )


class _FusedBlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, embeddings: Tensor | None, markov: Tensor | None, heads: BlockHeads,
        teacher: Teacher, pairs: BlockPairs, settings: BlockLossSettings, wants_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        sums = _BlockSums(states, embeddings, markov, heads, wants_grad)
        sizes = len(heads.draft_ids), len(heads.t2d)
        most = pairs_of_chunk(*sizes, states.dtype.itemsize, states.device.type, short=teacher.is_short)
        for blocks, part in _chunks(pairs, most):
            _add_chunk(sums, part, blocks, heads, teacher, pairs, settings)
        ctx.grads = (sums.grad_states, sums.grad_embeddings, sums.grad_markov)
        ctx.markov_dtype = None if markov is None else markov.dtype
        outputs = (sums.losses, sums.hits, sums.overlaps, sums.covered)
        ctx.mark_non_differentiable(*outputs)
        return sums.total, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        of_states, of_embeddings, of_markov = (None if one is None else one * grads[0] for one in ctx.grads)
        return of_states, of_embeddings, None if of_markov is None else of_markov.to(ctx.markov_dtype), *[None] * 5


def _chunks(pairs: BlockPairs, most: int) -> list[tuple[slice, slice]]:
    """(blocks, their pairs) of every chunk: whole blocks with `most` pairs together, or one block."""
    ends = pairs.ends
    found, block = [], 0
    while block < pairs.num_blocks:
        begin = ends[block - 1] if block else 0
        stop = block + 1
        while stop < pairs.num_blocks and ends[stop] - begin <= most:
            stop += 1
        found.append((slice(block, stop), slice(begin, ends[stop - 1])))
        block = stop
    return found


def pairs_of_chunk(draft_vocab: int, vocab: int, element: int, device_type: str, *, short: bool) -> int:
    """Pairs whose matrices fit CHUNK_BYTES, but so many at least that reading the head for their products pays."""
    size = bytes_of_pair(draft_vocab, vocab, element, short=short)
    fitting = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // size
    return max(fitting // MULTIPLE * MULTIPLE, LEAST_PAIRS.get(device_type, LEAST_PAIRS["cuda"]))


def bytes_of_pair(draft_vocab: int, vocab: int, element: int, *, short: bool) -> int:
    """What a pair of a chunk takes: four rows over the draft vocabulary, and two or three of its position."""
    return element * (6 * draft_vocab + (0 if short or draft_vocab == vocab else vocab))


class _BlockSums:
    """What a pass over the chunks reads and adds up."""

    def __init__(
        self, states: Tensor, embeddings: Tensor | None, markov: Tensor | None, heads: BlockHeads, wants_grad: bool
    ) -> None:
        dtype, device, num_pairs = states.dtype, states.device, len(states)
        self.states, self.embeddings = states, embeddings
        self.weight, self.markov = heads.weight.to(dtype), None if markov is None else markov.to(dtype)
        self.wants_grad = wants_grad
        self.total = torch.zeros((), device=device)
        self.losses, self.overlaps = torch.zeros(num_pairs, device=device), torch.zeros(num_pairs, device=device)
        self.hits, self.covered = torch.zeros((2, num_pairs), dtype=torch.bool, device=device)
        self.grad_states = torch.zeros_like(states) if wants_grad else None
        self.grad_embeddings = torch.zeros_like(embeddings) if wants_grad and embeddings is not None else None
        self.grad_markov = None
        if wants_grad and markov is not None:
            self.grad_markov = torch.zeros_like(markov, dtype=torch.float32)
        self.scratch = Scratch(device)

    def rows(self, name: str, num_rows: int) -> Tensor:
        """Scratch memory (R, D)."""
        return self.scratch(name, num_rows, len(self.weight), dtype=self.states.dtype)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of rows (R, D) and (R, D), added up in fp32: (R,)."""
        return torch.mul(left, right, out=self.rows("products", len(left))).sum(-1, dtype=torch.float32)

    def logits(self, part: slice) -> Tensor:
        """(m', D) of a chunk's pairs, in rows that the next chunk overwrites."""
        states = _padded(self.states[part])
        before = None if self.embeddings is None else _padded(self.embeddings[part])
        if states.dtype == torch.float32:  # the faster one, which has no place to write to
            z = product(states, self.weight)
            return z if before is None or self.markov is None else z.add_(product(before, self.markov))
        z = torch.mm(states, self.weight.T, out=self.rows("logits", len(states)))
        return z if before is None or self.markov is None else z.addmm_(before, self.markov.T)

    def add_grads(self, part: slice, grad: Tensor) -> None:
        """The gradient of a chunk's logits (m', D), multiplied out."""
        num_pairs = part.stop - part.start
        assert self.grad_states is not None
        self.grad_states[part] = product(grad, self.weight.T)[:num_pairs]
        if self.grad_embeddings is None or self.grad_markov is None:
            return
        assert self.embeddings is not None and self.markov is not None
        self.grad_embeddings[part] = product(grad, self.markov.T)[:num_pairs]
        add_product(self.grad_markov, grad, _padded(self.embeddings[part]), self.scratch)


def _padded(rows: Tensor) -> Tensor:
    """(m, ..) -> (m', ..): zeros behind, up to the next multiple."""
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, -len(rows) % MULTIPLE))


def _add_chunk(
    sums: _BlockSums, part: slice, blocks: slice, heads: BlockHeads, teacher: Teacher, pairs: BlockPairs,
    settings: BlockLossSettings,
) -> None:  # fmt: skip
    """Loss and gradient of a chunk's m pairs, in a few matrices (m', D) that every chunk overwrites.

    P is the target's distribution over all tokens at the draft's, `mass` what it has there, p = P / mass. With b = 1
    where q <= P and S = sum q b:

        sum min(P, q) = S + sum P (1 - b)           gradient of the loss = w (ce (q - p) + tv q (S - b))
    """
    of_ce, of_tv = MIX[settings.kind]
    num_pairs = part.stop - part.start
    positions, own = (sent(one, sums.states.device) for one in pairs.position[part].unique(return_inverse=True))
    taught = teacher.read(pad_index(positions), heads.draft_ids, heads.t2d)
    whole = taught.write_probs(sums.rows("positions", len(taught.logits)))
    mass = torch.ones(len(own), device=own.device)
    if len(heads.draft_ids) < len(heads.t2d):
        whole.mul_(taught.mass[:, None])
        mass = taught.mass[own].clamp_min(TINY)
    z = sums.logits(part)
    p = torch.index_select(whole, 0, pad_index(own), out=sums.rows("teacher", len(z)))
    highest, covered, choice = z[:num_pairs].amax(-1), taught.covered[own], taught.argmax[own]
    sums.hits[part] = is_argmax(z[:num_pairs], highest, choice) & covered
    agreed = sums.dot(p[:num_pairs], z[:num_pairs]) / mass
    q = torch.softmax(z, -1, out=z)
    cross_entropy = highest.float() - q[:num_pairs].amax(-1).float().log() - agreed
    smaller = torch.le(q, p, out=sums.rows("smaller", len(z)))
    kept = sums.dot(q[:num_pairs], smaller[:num_pairs])
    overlap = kept + mass - sums.dot(p[:num_pairs], smaller[:num_pairs])
    sums.losses[part], sums.overlaps[part], sums.covered[part] = cross_entropy * covered, overlap, covered
    chosen = q[:num_pairs].gather(1, choice.clamp(max=q.shape[-1] - 1)[:, None])[:, 0].float() * covered
    weights = pairs.weights(part, blocks, settings, chosen) * covered
    value = of_ce * cross_entropy + of_tv * (1 - overlap)
    if settings.kind == "kl":
        value = value - _entropy(taught)[own]
    sums.total += (value * weights).sum()
    if not sums.wants_grad:
        return
    of_q, of_b, of_p = (
        _padded(one)[:, None].to(q.dtype) for one in (weights * (of_ce + of_tv * kept), weights * of_tv, weights / mass)
    )
    q.mul_(torch.sub(of_q, smaller.mul_(of_b), out=smaller) if of_tv else of_q)
    sums.add_grads(part, q.addcmul_(p, of_p, value=-of_ce))


def _entropy(taught: TeacherChunk) -> Tensor:
    """(C,) of the target's distribution over the draft vocabulary."""
    return -(taught.probs * torch.log_softmax(taught.logits.float(), -1)).sum(-1)
