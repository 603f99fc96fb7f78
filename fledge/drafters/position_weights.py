"""How much each row counts at each TTT step: fixed weights (decay ** k), or dynamic ones from the draft's confidence.

Fixed weights say once how much depth matters. What depth is worth depends on the draft: step k only matters when steps
0..k-1 were accepted. With c_j the probability the draft gives the target's choice at step j of a row, the expected
length of its chain is sum_m prod_{j<=m} c_j, and the derivative by log c_k is the part of that sum from k on. Dynamic
weights are that part, as a share of the whole:

    s_j = floor + (1 - floor) * c_j          w_k = sum_{m>=k} prod_{j<=m} s_j / sum_{m>=0} prod_{j<=m} s_j

    s = .5 .5 .5   w = 1  .43 .14            an early draft: close to 0.5 ** k
    s = 1  1  1    w = 1  .67 .33            a sure draft: depth counts

They are taken per row and from this batch alone, without gradient: nothing to keep, to synchronise or to resume. Steps
a row is not asked at are passed over; those that a draw of depths leaves out are taken to be as sure as the row's last
one before. `floor` keeps late steps alive while the draft knows nothing.
"""

import torch
from torch import Tensor

from fledge.drafters.alignment import Alignment

# K TTT steps, P taught positions, M pairs of a step and a position, m those of n rows


def averaging_weights(alignment: Alignment, average: str) -> Tensor:
    """(M,) one over the rows that a pair's row is averaged with at its step, or 1 for a plain sum.

    Rows that a draw of depths leaves out are averaged with all the same, and those it leaves stand for them: 1 / share.
    """
    pairs, asked = alignment.pairs, alignment.asked.float()
    weights = 1 / alignment.share[pairs.step]
    if average == "token" or not len(weights):
        return weights
    per_document = asked.new_zeros((len(asked), int(alignment.document[-1]) + 1))
    per_document.index_add_(1, alignment.document, asked)
    return weights / per_document[pairs.step, alignment.document[pairs.place]]


def dynamic_weights(confidence: Tensor, row: Tensor, step: Tensor, asked: Tensor, floor: float) -> Tensor:
    """(m,) weights of all pairs of n rows.

    confidence (m,): the draft's probability of the target's choice, 0 where that is no draft token. row, step (m,) of
    the pairs. asked (K, n) bool: where the rows would learn, drawn or not.
    """
    sure = torch.full(asked.shape, floor, device=confidence.device)
    sure[step, row] += (1 - floor) * confidence.float()
    drawn = torch.zeros_like(asked).index_put((step, row), asked.new_ones(()))
    for k in range(1, len(asked)):
        sure[k] = torch.where(drawn[k], sure[k], sure[k - 1])
    reach = torch.where(asked, sure, 1.0).cumprod(0) * asked
    tail = reach.flip(0).cumsum(0).flip(0)
    return (tail / tail[0].clamp_min(1e-9))[step, row]
