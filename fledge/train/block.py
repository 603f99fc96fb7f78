"""Training block drafts, DFlash and DSpark: their config, their start, their module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.console import say
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.dspark.checkpoint import BlockHead, read_block
from fledge.drafters.dspark.config import BlockConfig, DraftType, derive_block, read_block_overrides
from fledge.drafters.dspark.loss import BlockLossKind, BlockLossSettings
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.training import BlockModule
from fledge.errors import UserError
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainSettings
from fledge.train.settings import DraftSettings
from fledge.train.sources import Source
from fledge.train.vocabulary import draft_vocabulary

USUAL_LOSS: dict[str, BlockLossKind] = {"dflash": "ce", "dspark": "ce+tv"}
SHAPE = ("num_layers", "block_size", "mask_token_id", "sample_from_anchor", "causal", "sliding_window")


@dataclass(frozen=True)
class BlockKind:
    """See `fledge.train.kinds.TrainingKind`."""

    draft_type: DraftType

    def check(self, args: DraftSettings) -> None:
        if args.sequence_parallel > 1:
            raise UserError(
                f"--sequence-parallel {args.sequence_parallel}: only EAGLE-3 heads are trained so. A {self.draft_type} "
                f"draft takes --num-anchors blocks of a sequence, whatever its length; leave it out."
            )
        if args.draft_config:
            read_block_overrides(Path(args.draft_config))
        if args.init_from:
            read_block(Path(args.init_from))

    def learning_rate(self, hidden_size: int) -> float:
        return min(1e-3, 2.4 / hidden_size)  # the published 6e-4 at a hidden size of 4096

    def make(self, args: DraftSettings, source: Source, first: Callable[[], Sequence[TargetRecord]]) -> BoundHead:
        """A fresh draft (its head the target's rows, its context the target's highest tap) or one continued."""
        before = read_block(Path(args.init_from)) if args.init_from else None
        config = block_config(self.draft_type, args, source, before)
        vocab = draft_vocabulary(config, source)
        draft = BlockDraft(config, source.embedding, source.head_weight)
        draft.set_vocab(vocab.d2t, vocab.t2d)
        draft.warm_start(torch.cat([record.tap_hidden for record in first()]))
        if before is not None:
            say(f"continuing from {args.init_from}: {take_weights(draft, before)}")
        return draft

    def module(self, draft: BoundHead, args: TrainSettings, source: Source) -> BlockModule:
        assert isinstance(draft, BlockDraft)
        settings = BlockLossSettings(
            kind=args.draft.block_loss or USUAL_LOSS[self.draft_type],
            position_weights=args.draft.position_weights, average=args.draft.loss_average,
        )  # fmt: skip
        return BlockModule(
            draft, source.teacher_head, settings, source.teacher_rows, num_anchors=args.draft.num_anchors,
            seed=args.trainer.seed,
        )  # fmt: skip


def block_config(
    draft_type: DraftType, args: DraftSettings, source: Source, before: BlockHead | None = None
) -> BlockConfig:
    """Derived from the target; shape by a file or the draft to continue, block and layers by their flags."""
    overrides: dict[str, Any] = {}
    if before is not None:
        overrides = {name: getattr(before.config, name) for name in SHAPE}
    if args.draft_config:
        overrides |= read_block_overrides(Path(args.draft_config))
    given = {"num_layers": args.draft_layers, "block_size": args.block_size}
    overrides |= {name: value for name, value in given.items() if value is not None}
    overrides.setdefault("mask_token_id", unused_token(source.counts, source.always))
    wanted = args.draft_vocab_size if args.draft_vocab_size is not None else overrides.pop("draft_vocab_size", None)
    overrides.pop("draft_vocab_size", None)
    return derive_block(
        source.text_config, draft_type, vocab_size=source.head_weight.shape[0], tap_layers=source.tap_layers,
        mask_token_id=overrides.pop("mask_token_id"), draft_vocab_size=wanted, overrides=overrides,
    )  # fmt: skip


def unused_token(counts: Tensor, always: Sequence[int]) -> int:
    """The highest id that the training data never supervises and that ends no answer: what mask slots are given.

    Its embedding is frozen and only has to be one that no anchor has. It is found from what a live target and a store
    both know, so online and offline training agree.
    """
    taken = counts > 0
    taken[list(always)] = True
    free = (~taken).nonzero()
    if not len(free):
        raise UserError("the training data uses every token of the vocabulary: name a mask_token_id in the config "
                        "file of --draft-config.")  # fmt: skip
    return int(free[-1])


@torch.no_grad()
def take_weights(draft: BlockDraft, before: BlockHead) -> str:
    """Copy what both have; a DFlash draft starts a DSpark one, whose heads are new. Returns what was done."""
    if draft.config.tap_layers != before.config.tap_layers:
        taps = " ".join(map(str, before.config.tap_layers))
        raise UserError(
            f"--init-from: that draft reads the inputs of layers {taps}, this run taps "
            f"{' '.join(map(str, draft.config.tap_layers))}. Give --tap-layers {taps}."
        )
    kept, fresh = [], []
    own = {"lm_head.weight", "markov_head.markov_w2.weight"}  # rows of a draft vocabulary
    same_vocab = draft.config.draft_vocab_size == before.config.draft_vocab_size and (
        draft.config.full_vocab or torch.equal(draft.t2d.cpu(), before.tensors["t2d"])
    )
    for name, weight in draft.named_parameters():
        old = before.tensors.get(name)
        if name == "lm_head.weight":
            continue
        if old is None or (name in own and not same_vocab):
            fresh.append(name)
        elif old.shape != weight.shape:
            raise UserError(
                f"--init-from: {name} is {tuple(old.shape)} there, {tuple(weight.shape)} here. Give the same sizes "
                f"(--draft-layers, --draft-config)."
            )
        else:
            weight.copy_(old)
            kept.append(name)
    return f"{len(kept)} tensors kept" + (f", fresh are {', '.join(fresh)}" if fresh else "")
