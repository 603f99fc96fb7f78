"""What the Trainer optimises of a block draft: one forward of all drawn blocks, and their loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fledge.drafters.batch import Batch, sent
from fledge.drafters.dspark.attention import block_attention, chunks_of
from fledge.drafters.dspark.blocks import Blocks, draw_blocks
from fledge.drafters.dspark.loss import BlockHeads, BlockLossSettings, block_loss
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.loss import LossOutput, Teacher
from fledge.drafters.training import DraftModule
from fledge.errors import UserError

# N rows of all documents, b blocks, K drafts of a block, S its slots, H hidden


class BlockModule(DraftModule):
    """Trains `draft`. `teacher_head` maps last_hidden (.., H) to target logits; `teacher_rows` gives the same head for
    some ids only, which batches with a summary use."""

    draft: BlockDraft

    def __init__(
        self, draft: BlockDraft, teacher_head: Callable[[Tensor], Tensor], settings: BlockLossSettings,
        teacher_rows: Callable[[Tensor], Callable[[Tensor], Tensor] | None] | None = None, *, num_anchors: int,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.draft, self.settings = draft, settings
        self.num_steps, self.average = draft.config.num_drafts, settings.average
        self.teacher_head = teacher_head
        smaller = teacher_rows is not None and not draft.config.full_vocab
        self.draft_head = teacher_rows(self._draft_ids()) if teacher_rows is not None and smaller else None
        self.num_anchors, self.seed = num_anchors, seed

    def forward(self, batch: Batch, anchor: Tensor | None = None, *, draw: int | None = None) -> LossOutput:
        """Summed loss and metric sums of one batch. `draw`: the number of the optimisation step, None in evaluation.

        `anchor` (): an input whose gradient comes last, for ZeRO-3. Empty batches give a zero that still reaches every
        parameter.
        """
        config, device = self.draft.config, batch.input_ids.device
        seed = (self.seed, 0 if draw is None else 1 + draw)
        blocks = draw_blocks(batch, config.num_drafts, self.num_anchors, seed)
        states = block_states(self.draft, batch, blocks)[:, config.first_slot :]
        before = batch.input_ids[sent(self._rows_before(blocks, len(batch.input_ids)), device)]
        embeddings = None if self.draft.markov_head is None else self.draft.markov_states(before)
        confidence = None if self.draft.confidence_head is None else self.draft.confidence(states, before)
        output = block_loss(
            states, embeddings, confidence, self._heads(), self._teacher(batch), blocks, self.settings
        )  # fmt: skip
        loss = output.loss if anchor is None else output.loss + 0 * anchor
        if not len(blocks):
            loss = loss + 0 * torch.stack([p.sum() for p in self.draft.parameters() if p.requires_grad]).sum()
        return output._replace(loss=loss)

    def _rows_before(self, blocks: Blocks, num_rows: int) -> Tensor:
        """(b, K) rows of the tokens before each draft; drafts that are not supervised may say any."""
        return (blocks.rows[:, None] + torch.arange(self.draft.config.num_drafts)).clamp(max=num_rows - 1)

    def _heads(self) -> BlockHeads:
        markov = self.draft.markov_head
        return BlockHeads(
            self.draft.head_weight, None if markov is None else markov.markov_w2.weight, self._draft_ids(),
            self.draft.t2d,
        )  # fmt: skip

    def _teacher(self, batch: Batch) -> Teacher:
        return Teacher(
            last_hidden=batch.last_hidden, head=self.teacher_head, draft_head=self.draft_head, summary=batch.summary
        )

    def _draft_ids(self) -> Tensor:
        """(D,) target ids of the draft vocabulary."""
        return self.draft.target_ids(torch.arange(self.draft.config.draft_vocab_size, device=self.draft.t2d.device))

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The Trainer's --activation_checkpointing."""
        raise UserError(
            "--activation_checkpointing: a block draft is one forward of few layers, whose activations are kept. Leave "
            "it out, and lower --num-anchors where memory is short."
        )

    gradient_checkpointing_enable = activation_checkpointing_enable


def block_states(draft: BlockDraft, batch: Batch, blocks: Blocks) -> Tensor:
    """Normed states (b, S, H) of all slots of all blocks."""
    config, device = draft.config, batch.input_ids.device
    chunks = chunks_of(blocks, config.block_size, len(batch.input_ids), config.sliding_window, device)
    rows = sent(blocks.rows, device)
    slots = torch.arange(config.block_size, device=device)
    positions = (batch.position_ids[..., rows, None] + slots).flatten(-2)
    cos, sin = (part.unflatten(0, (len(rows), config.block_size)) for part in draft.rope(positions))
    context = draft.context(batch.tap_hidden)
    keys_values = draft.context_keys(context, draft.rope(batch.position_ids))
    inputs = draft.block_inputs(batch.input_ids[rows]).to(context.dtype)  # fp32 ones would stay so in every layer

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return block_attention(q, k, v, *keys_values[layer], chunks, config.causal)

    return draft.forward_block(inputs, (cos, sin), attend)
