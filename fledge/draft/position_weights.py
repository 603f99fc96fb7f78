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

from fledge.draft.ttt import Alignment

# K TTT steps, P taught positions, S active rows


def averaging_weights(alignment: Alignment, average: str) -> Tensor:
    """(K, P) one over the rows position p's row is averaged with at step k, or 1 for a plain sum; 0 where untrained.

    Rows that a draw of depths leaves out are averaged with all the same, and those it leaves stand for them.
    """
    weights = alignment.trained / alignment.share[:, None]
    if average == "token" or not weights.numel():
        return weights
    asked = alignment.asked.float()
    per_document = asked.new_zeros((len(asked), int(alignment.document[-1]) + 1))
    per_document.index_add_(1, alignment.document, asked)
    return weights / per_document[:, alignment.document].clamp_min(1)


def fixed_weights(alignment: Alignment, step_decay: float) -> Tensor:
    """(K, 1) decay ** k."""
    steps = torch.arange(len(alignment.trained), device=alignment.trained.device, dtype=torch.float32)
    return (step_decay**steps)[:, None]


def dynamic_weights(alignment: Alignment, confidence: Tensor, floor: float) -> Tensor:
    """(K, P) from the draft's probability of the target's choice, (K, P), 0 where that is no draft token."""
    num_steps, num_rows = len(alignment.row_index), max(1, len(alignment.rows))
    index = rows_of_pairs(alignment)  # (K, P)
    steps = torch.arange(num_steps, device=index.device)[:, None].expand_as(index)

    def on_rows(chosen: Tensor, values: Tensor) -> Tensor:
        """(K, P) -> (K, S), zero where nothing is chosen."""
        return values.new_zeros((num_steps, num_rows)).index_put((steps[chosen], index[chosen]), values[chosen])

    asked, trained = (on_rows(chosen, chosen) for chosen in (alignment.asked, alignment.trained))
    sure = floor + (1 - floor) * on_rows(alignment.trained, confidence)
    for step in range(1, num_steps):
        sure[step] = torch.where(trained[step], sure[step], sure[step - 1])
    reach = torch.where(asked, sure, 1.0).cumprod(0) * asked
    tail = reach.flip(0).cumsum(0).flip(0)
    share = tail / tail[0].clamp_min(1e-9)
    return torch.where(alignment.trained, share[steps, index], 0.0)


def rows_of_pairs(alignment: Alignment) -> Tensor:
    """(K, P) index into the rows of row p - 1 - k, trained or left out by a draw of depths; 0 where it is not asked."""
    place = alignment.rows.new_zeros(int(alignment.rows.max()) + 1 if len(alignment.rows) else 1)
    place[alignment.rows] = torch.arange(len(alignment.rows), device=place.device)
    steps = torch.arange(len(alignment.asked), device=place.device)[:, None]
    return place[torch.where(alignment.asked, alignment.positions - 1 - steps, 0)]
