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
from fledge.drafters.cpu_kernels import is_argmax, pad_index, product
from fledge.drafters.dspark.blocks import Blocks
from fledge.drafters.loss import Average, LossOutput, PositionWeights, Teacher, TeacherChunk, pairs_per_chunk
from fledge.drafters.position_weights import CONFIDENCE_FLOOR, dynamic_weights

# b blocks, K drafts of a block, M supervised pairs of a block and a draft, m of a chunk, C teacher positions of a chunk
# H hidden, r Markov rank, D draft vocab, V target vocab

BlockLossKind = Literal["ce", "ce+tv", "kl"]
MIX = {"ce": (1.0, 0.0), "ce+tv": (0.1, 0.9), "kl": (1.0, 0.0)}  # of CE and TV
DECAY = 4.0  # drafts until a fixed weight has fallen to 1 / e


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
        device, num_pairs = states.device, len(states)
        made = _Results(
            total=torch.zeros((), device=device),
            losses=torch.zeros(num_pairs, device=device),
            hits=torch.zeros(num_pairs, dtype=torch.bool, device=device),
            overlaps=torch.zeros(num_pairs, device=device),
            covered=torch.zeros(num_pairs, dtype=torch.bool, device=device),
            grad_states=torch.zeros_like(states) if wants_grad else None,
            grad_embeddings=torch.zeros_like(embeddings) if wants_grad and embeddings is not None else None,
            grad_markov=torch.zeros_like(markov, dtype=torch.float32) if wants_grad and markov is not None else None,
        )
        for blocks, part in _chunks(pairs, len(heads.draft_ids), len(heads.t2d), device.type, teacher.is_short):
            _add_chunk(made, part, blocks, states, embeddings, heads, teacher, pairs, settings)
        ctx.grads = (made.grad_states, made.grad_embeddings, made.grad_markov)
        ctx.markov_dtype = None if markov is None else markov.dtype
        outputs = (made.losses, made.hits, made.overlaps, made.covered)
        ctx.mark_non_differentiable(*outputs)
        return made.total, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        of_states, of_embeddings, of_markov = (None if one is None else one * grads[0] for one in ctx.grads)
        return of_states, of_embeddings, None if of_markov is None else of_markov.to(ctx.markov_dtype), *[None] * 5


class _Results(NamedTuple):
    """What a pass over the chunks fills in."""

    total: Tensor
    losses: Tensor
    hits: Tensor
    overlaps: Tensor
    covered: Tensor
    grad_states: Tensor | None
    grad_embeddings: Tensor | None
    grad_markov: Tensor | None


def _chunks(
    pairs: BlockPairs, draft_vocab: int, vocab: int, device_type: str, short: bool
) -> list[tuple[slice, slice]]:  # fmt: skip
    """(blocks, their pairs) of every chunk: whole blocks, as many as memory allows."""
    most = pairs_per_chunk(4 * draft_vocab, vocab, device_type, steps=1, short=short)  # about four matrices of a pair
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


def _add_chunk(
    made: _Results, part: slice, blocks: slice, states: Tensor, embeddings: Tensor | None, heads: BlockHeads,
    teacher: Teacher, pairs: BlockPairs, settings: BlockLossSettings,
) -> None:  # fmt: skip
    """Loss and gradient of a chunk's m pairs."""
    positions, own = (sent(one, states.device) for one in pairs.position[part].unique(return_inverse=True))
    taught = teacher.read(pad_index(positions), heads.draft_ids, heads.t2d)
    weight = heads.weight.to(states.dtype)
    logits = product(states[part], weight)
    if embeddings is not None and heads.markov is not None:
        logits = logits + product(embeddings[part], heads.markov.to(states.dtype))
    logits = logits.float()  # (m, D)
    covered, choice = taught.covered[own], taught.argmax[own]
    highest = logits.amax(-1)
    log_q = torch.log_softmax(logits, -1)
    q, p = log_q.exp(), taught.probs[own]
    kept = torch.minimum(p * taught.mass[own, None], q)
    overlap = kept.sum(-1)
    cross_entropy = -(p * log_q).sum(-1)
    made.hits[part] = is_argmax(logits, highest, choice) & covered
    made.losses[part], made.overlaps[part], made.covered[part] = cross_entropy * covered, overlap, covered
    chosen = q.gather(1, choice.clamp(max=q.shape[-1] - 1)[:, None])[:, 0] * covered
    weights = pairs.weights(part, blocks, settings, chosen) * covered
    of_ce, of_tv = MIX[settings.kind]
    value = of_ce * cross_entropy + of_tv * (1 - overlap)
    if settings.kind == "kl":
        value = value - _entropy(taught)[own]
    made.total.add_((value * weights).sum())
    if made.grad_states is None:
        return
    grad = of_ce * (q - p)
    if of_tv:  # q (S - 1) where q is the smaller one and q S elsewhere; S: what q has where it is the smaller one
        smaller = (kept == q) * q
        grad += of_tv * (q * smaller.sum(-1, keepdim=True) - smaller)
    grad = (grad * weights[:, None]).to(states.dtype)
    made.grad_states[part] = product(grad, weight.T)
    if made.grad_embeddings is not None and made.grad_markov is not None and embeddings is not None:
        assert heads.markov is not None
        made.grad_embeddings[part] = product(grad, heads.markov.to(states.dtype).T)
        made.grad_markov.add_((grad.T @ embeddings[part]).float())


def _entropy(taught: TeacherChunk) -> Tensor:
    """(C,) of the target's distribution over the draft vocabulary."""
    return -(taught.probs * torch.log_softmax(taught.logits.float(), -1)).sum(-1)
