"""What the Trainer optimises: the draft with its loss, as one module whose forward takes a batch.

DDP, FSDP and DeepSpeed synchronise gradients around a forward call, so the loss is computed inside one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fledge.draft.batch import Batch
from fledge.draft.loss import LossOutput, LossSettings, ttt_loss
from fledge.draft.low_rank import LowRankHead
from fledge.draft.model import DraftModel
from fledge.draft.ttt import align, unroll
from fledge.errors import UserError


class TTTModule(nn.Module):
    """Unrolls `draft` over a batch for `ttt_steps` steps. `teacher_head` maps last_hidden (.., H) to target logits."""

    def __init__(
        self, draft: DraftModel, teacher_head: Callable[[Tensor], Tensor], ttt_steps: int, settings: LossSettings
    ) -> None:
        super().__init__()
        self.draft, self.ttt_steps, self.settings = draft, ttt_steps, settings
        self.teacher_head = teacher_head
        self.recompute = False

    def forward(self, batch: Batch) -> LossOutput:
        """Summed loss and metric sums of one batch; empty batches give a zero that still reaches every parameter."""
        alignment = align(batch, self.ttt_steps)
        states = unroll(self.draft, batch, alignment, self.ttt_steps, recompute=self.recompute)
        head: Any = self.draft.lm_head
        if isinstance(head, LowRankHead):
            states, head = head.down(states), head.up
        draft_ids = self.draft.target_ids(torch.arange(self.draft.config.draft_vocab_size, device=states.device))
        return ttt_loss(
            states, head.weight, batch.last_hidden, self.teacher_head, draft_ids, self.draft.t2d, alignment,
            self.settings,
        )  # fmt: skip

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """The Trainer's --activation_checkpointing: every TTT step but its input is computed again in the backward."""
        given = {**(activation_checkpointing_kwargs or {})}
        given.pop("use_reentrant", None)  # always the non-reentrant kind, which DDP and FSDP want
        if given or every_n_layers != 1 or offload:
            raise UserError(
                f"--activation_checkpointing_kwargs {given or ''} every_n_layers={every_n_layers} offload={offload}: "
                f"the draft has one layer, whose TTT steps are all checkpointed and not offloaded. Leave it out."
            )
        self.recompute = True

    gradient_checkpointing_enable = activation_checkpointing_enable
