"""Which blocks of a batch are trained: anchors drawn at random, what their slots learn, and which keys they see.

The block of an anchor, row p of a document x_0 .. x_{T-1} with loss mask l; its drafts are numbered k = 0, 1, ..

    block input     x_p M M ..                          positions p, p + 1, ..
    sees            target states of rows < p           (of the last `window` of them)
    draft k         the token x_{p+1+k}                 slot k (sample_from_anchor) or slot k + 1
    teacher         the target at row p + k             softmax(L_{p+k})
    token before    x_{p+k}                             for the Markov head: the true one
    supervised      where l_{p+1} .. l_{p+1+k}          as far as the target's own text reaches, without a gap

An anchor is a token of the target that one more follows (l_p and l_{p+1}), since a root is always an emitted token.
Up to `num_anchors` of them are drawn from each document at every step, without replacement. The draw depends on the
document's id, the seed and the step, not on the other documents of the batch or the rank, so a resumed run draws alike.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.drafters.batch import Batch

# N rows of all documents, b blocks, K drafts of a block, M supervised pairs of a block and a draft


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch, in the order of their anchors. On the CPU: they decide how much there is to compute."""

    rows: Tensor  # (b,) int64 row of each anchor
    first: Tensor  # (b,) int64 first row of its document
    document: Tensor  # (b,) int64
    supervised: Tensor  # (b, K) bool
    candidates: Tensor  # (documents,) int64 how many anchors there were to draw from

    def __len__(self) -> int:
        return len(self.rows)


def draw_blocks(batch: Batch, num_drafts: int, num_anchors: int, seed: tuple[int, ...]) -> Blocks:
    """Anchors of every document and what their drafts learn."""
    lengths = torch.tensor(batch.lengths)
    stops = lengths.cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first, last = (stops - lengths)[document], (stops - 1)[document]
    in_mask, row = batch.loss_mask, torch.arange(len(document))
    follows = F.pad(in_mask, (0, num_drafts))[row[:, None] + 1 + torch.arange(num_drafts)]  # (N, K) l_{p+1+k}
    follows &= row[:, None] + 1 + torch.arange(num_drafts) <= last[:, None]
    supervised = follows.long().cumprod(1).bool()
    possible = in_mask & supervised[:, 0] & (row > first)
    rows = []
    for number, found in enumerate(torch.split(possible, list(batch.lengths))):
        places = found.nonzero()[:, 0].numpy()
        if len(places) > num_anchors:
            chance = np.random.default_rng([*seed, zlib.crc32(batch.sample_ids[number].encode())])
            places = np.sort(chance.choice(places, num_anchors, replace=False))
        rows.append(torch.from_numpy(places) + (stops - lengths)[number])
    anchors = torch.cat(rows)
    return Blocks(
        rows=anchors, first=first[anchors], document=document[anchors], supervised=supervised[anchors],
        candidates=torch.zeros_like(lengths).index_add_(0, document, possible.long()),
    )  # fmt: skip
