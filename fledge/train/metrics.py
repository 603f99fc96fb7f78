"""Training metrics as sums that add up over batches, ranks and steps.

acc_k       share of rows at TTT step k whose top-1 is the target's argmax (outside the draft vocabulary: a miss)
overlap_k   mean of sum_v min(p, q): the acceptance probability at temperature 1
tau         1 + sum_k P(right at steps 0..k): predicted acceptance length of a chain of K drafts, greedy
coverage    share of positions whose target argmax is a draft token: the ceiling of acc_k
"""

import torch
from torch import Tensor

from fledge.drafters.loss import LossOutput


class MetricSums:
    """Adds LossOutputs; `summary` divides."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.num_steps = num_steps
        self.sums = torch.zeros(5 * num_steps + 2, dtype=torch.float64, device=device)

    def add(self, output: LossOutput) -> None:
        """Add one batch; no host synchronisation."""
        parts = (output.step_loss, output.trained, output.hits, output.prefix_hits, output.overlap)
        last = torch.stack((output.covered, output.positions))
        self.sums += torch.cat([part.detach().double() for part in (*parts, last)])

    def summary(self, sums: Tensor | None = None) -> dict[str, float]:
        """Metrics from the sums (or from sums reduced over ranks). Empty when nothing was trained."""
        values = (self.sums if sums is None else sums).tolist()
        k = self.num_steps
        loss, trained, hits, prefix, overlap = (values[i * k : (i + 1) * k] for i in range(5))
        covered, positions = values[5 * k :]
        if not positions:
            return {}
        result = {"tau": 1 + sum(p / max(t, 1) for p, t in zip(prefix, trained, strict=True))}
        for step in range(k):
            result[f"acc_{step}"] = hits[step] / max(trained[step], 1)
        if any(overlap):
            result |= {f"overlap_{step}": overlap[step] / max(trained[step], 1) for step in range(k)}
        result["cross_entropy_0"] = loss[0] / max(covered, 1)
        result["coverage"] = covered / positions
        return result

    def reset(self) -> None:
        self.sums.zero_()


class FiniteLosses:
    """Remembers the first loss that was no number and its step, where the losses are: only `first_bad` waits."""

    def __init__(self, device: torch.device) -> None:
        self._found = torch.zeros(2, dtype=torch.float64, device=device)  # the step (0: none), and the loss

    def add(self, loss: Tensor, step: int) -> None:
        """The loss () of this step; no host synchronisation."""
        loss = loss.detach().double()
        is_first = ~loss.isfinite() & (self._found[0] == 0)
        self._found = torch.where(is_first, torch.stack((torch.full_like(loss, step), loss)), self._found)

    def first_bad(self) -> tuple[int, float] | None:
        """Its step and the loss."""
        step, loss = self._found.tolist()
        return (int(step), loss) if step else None


def taught_positions(loss_mask: Tensor) -> int:
    """Positions of one document that teach a row at step 0: what per-token averaging counts (`ttt.align`)."""
    return int((loss_mask[1:-1] & loss_mask[2:]).sum())
