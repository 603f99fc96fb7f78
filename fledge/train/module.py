"""What the Trainer optimises: the draft with its loss, as one module whose forward takes a batch.

DDP, FSDP and DeepSpeed synchronise gradients around a forward call, so the loss is computed inside one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fledge.draft.batch import Batch
from fledge.draft.loss import LossOutput, LossSettings, ttt_loss
from fledge.draft.model import DraftModel
from fledge.draft.ttt import align, unroll


class TTTModule(nn.Module):
    """Unrolls `draft` over a batch for `ttt_steps` steps. `teacher_head` maps last_hidden (.., H) to target logits."""

    def __init__(
        self, draft: DraftModel, teacher_head: Callable[[Tensor], Tensor], ttt_steps: int, settings: LossSettings
    ) -> None:
        super().__init__()
        self.draft, self.ttt_steps, self.settings = draft, ttt_steps, settings
        self.teacher_head = teacher_head

    def forward(self, batch: Batch) -> LossOutput:
        """Summed loss and metric sums of one batch; empty batches give a zero that still reaches every parameter."""
        alignment = align(batch, self.ttt_steps)
        states = unroll(self.draft, batch, alignment, self.ttt_steps)
        draft_ids = self.draft.target_ids(torch.arange(self.draft.config.draft_vocab_size, device=states.device))
        return ttt_loss(
            states, self.draft.lm_head.weight, batch.last_hidden, self.teacher_head, draft_ids, self.draft.t2d,
            alignment, self.settings,
        )  # fmt: skip
