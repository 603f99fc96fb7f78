"""How much each row counts at each TTT step: fixed weights (0.8 ** k), or dynamic ones from the draft's confidence.

Step k only matters when steps 0..k-1 were accepted, so the value of a deep step depends on how good the draft is. Let
c_j be the probability the draft gives the target's choice at step j of a row. The expected length of its chain is
sum_m prod_{j<=m} c_j, and the derivative by log c_k is the part of that sum from k on. The dynamic weight of step k is
that part, as a share of the whole:

    s_j = floor + (1 - floor) * c_j          w_k = sum_{m>=k} prod_{j<=m} s_j / sum_{m>=0} prod_{j<=m} s_j

    s = .5 .5 .5   w = 1  .43 .14            an early draft: close to 0.5 ** k
    s = 1  1  1    w = 1  .67 .33            a confident draft: depth counts

Weights are computed per row and from this batch alone, without gradient: there is no state to keep, synchronise or
resume. Steps at which a row is not supervised are skipped. Steps that random depths leave out are given the confidence
of the row's last step before them. `floor` keeps late steps alive while the draft knows nothing.
"""

import torch
from torch import Tensor

from fledge.drafters.alignment import Alignment

STEP_DECAY = 0.8  # fixed weights are STEP_DECAY ** k, as other trainers have them
CONFIDENCE_FLOOR = 0.5  # the least confidence that dynamic weights assume of a step

# K TTT steps, P teacher positions, M pairs of a step and a position, m those of n rows


def averaging_weights(alignment: Alignment, average: str) -> Tensor:
    """(M,) one over the rows that a pair's row is averaged with at its step, or 1 for a plain sum.

    The average counts rows that random depths leave out; the rows that remain stand for them with a factor 1 / share.
    """
    pairs, supervised = alignment.pairs, alignment.supervised.float()
    weights = 1 / alignment.share[pairs.step]
    if average == "token" or not len(weights):
        return weights
    per_document = supervised.new_zeros((len(supervised), alignment.num_documents))
    per_document.index_add_(1, alignment.document, supervised)
    return weights / per_document[pairs.step, alignment.document[pairs.place]]


def dynamic_weights(confidence: Tensor, row: Tensor, step: Tensor, supervised: Tensor, floor: float) -> Tensor:
    """(m,) weights of all pairs of n rows.

    confidence (m,): the draft's probability of the target's choice, 0 where that is no draft token. row, step (m,) of
    the pairs. supervised (K, n) bool: where the rows are taught, whether random depths leave the step out or not.
    """
    confident = torch.full(supervised.shape, floor, device=confidence.device)
    confident[step, row] += (1 - floor) * confidence.float()
    drawn = torch.zeros_like(supervised).index_put((step, row), supervised.new_ones(()))
    for k in range(1, len(supervised)):
        confident[k] = torch.where(drawn[k], confident[k], confident[k - 1])
    reach = torch.where(supervised, confident, 1.0).cumprod(0) * supervised
    tail = reach.flip(0).cumsum(0).flip(0)
    return (tail / tail[0].clamp_min(1e-9))[step, row]
