"""What the Trainer optimises: the draft with its loss, as one module whose forward takes a batch.

DDP, FSDP and DeepSpeed synchronise gradients around a forward call, so the loss is computed inside one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fledge.drafters.batch import Batch
from fledge.drafters.depth import RandomDepth
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.loss import LossOutput, LossSettings, Teacher, ttt_loss
from fledge.drafters.sequence_share import Share
from fledge.drafters.training import DraftModule
from fledge.errors import UserError

HeadRows = Callable[[Tensor], Callable[[Tensor], Tensor] | None]


class TTTModule(DraftModule):
    """Unrolls `draft` over a batch for `ttt_steps` steps. `teacher_head` maps last_hidden (.., H) to target logits."""

    draft: DraftModel

    def __init__(
        self, draft: DraftModel, teacher_head: Callable[[Tensor], Tensor], ttt_steps: int, settings: LossSettings,
        teacher_rows: HeadRows | None = None, *, survival: float = 1.0, seed: int = 0, share: Share | None = None,
    ) -> None:  # fmt: skip
        """`teacher_rows`: the same head for some ids only (`TargetHead.rows`), which batches with a summary use.

        With `survival` below 1, rows are unrolled to depths drawn at random (`fledge.drafters.depth`). With `share`,
        the rows of a sequence are divided among processes.
        """
        super().__init__()
        self.draft, self.ttt_steps, self.settings = draft, ttt_steps, settings
        self.teacher_head = teacher_head
        smaller = draft.config.draft_vocab_size < draft.config.vocab_size
        self.draft_head = teacher_rows(self._draft_ids()) if teacher_rows is not None and smaller else None
        self.survival, self.seed, self.share = survival, seed, share
        self.processes_per_sequence = 1 if share is None else share.count
        self.recompute = False
        self.num_steps, self.average = ttt_steps, settings.average

    def forward(self, batch: Batch, anchor: Tensor | None = None, *, draw: int | None = None) -> LossOutput:
        """Summed loss and metric sums of one batch; empty batches give a zero that still reaches every parameter.

        ZeRO-3 lets go of the weights as soon as the gradient of the module's inputs is known, and a batch needs none:
        `anchor` () is an input whose gradient, zero, comes last. `draw`: the number of the optimisation step, for
        depths at random; None: full depth.
        """
        depth = None if draw is None or self.survival == 1 else RandomDepth(self.survival, (self.seed, draw))
        alignment = align(batch, self.ttt_steps, depth, self.share)
        states = unroll(self.draft, batch, alignment, self.ttt_steps, recompute=self.recompute)
        teacher = Teacher(
            last_hidden=batch.last_hidden, head=self.teacher_head, draft_head=self.draft_head, summary=batch.summary
        )
        output = ttt_loss(
            states, self.draft.lm_head.weight, teacher, self._draft_ids(), self.draft.t2d, alignment, self.settings
        )
        return output if anchor is None else output._replace(loss=output.loss + 0 * anchor)

    def _draft_ids(self) -> Tensor:
        """(D,) target ids of the draft vocabulary."""
        return self.draft.target_ids(torch.arange(self.draft.config.draft_vocab_size, device=self.draft.t2d.device))

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
                f"a draft's TTT steps are all checkpointed and not offloaded. Leave it out."
            )
        self.recompute = True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """What older versions of transformers call instead."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)
