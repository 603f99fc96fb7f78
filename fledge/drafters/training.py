"""What the Trainer optimises: a draft with its loss, as one module whose forward takes a batch."""

from torch import Tensor, nn

from fledge.drafters.batch import Batch
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.loss import LossOutput


class DraftModule(nn.Module):
    """DDP, FSDP and DeepSpeed synchronise gradients around a forward call, so the loss is computed inside one."""

    draft: BoundHead
    num_steps: int
    """Draft tokens that the metrics count apart."""
    average: str
    """How losses are averaged: by `sequence` or by `token`."""
    processes_per_sequence: int = 1
    """Processes that are given the same batches and divide their rows."""

    def forward(self, batch: Batch, anchor: Tensor | None = None, *, draw: int | None = None) -> LossOutput:
        """Summed loss and metric sums of one batch; empty batches give a zero that still reaches every parameter.

        ZeRO-3 lets go of the weights as soon as the gradient of the module's inputs is known, and a batch needs none:
        `anchor` () is an input whose gradient, zero, comes last. `draw`: the number of the optimisation step, for what
        is drawn at random; None in evaluation.
        """
        raise NotImplementedError
