"""Training EAGLE-3 and EAGLE-3.1 heads: their config, their start, their module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge.drafters.bound_head import BoundHead
from fledge.drafters.eagle3.config import DraftConfig, derive, read_overrides
from fledge.drafters.eagle3.foreign import read_config
from fledge.drafters.eagle3.model import DraftModel
from fledge.errors import UserError
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainSettings
from fledge.train.module import TTTModule
from fledge.train.settings import DraftSettings
from fledge.train.shared_batches import share_of_process
from fledge.train.sources import Source
from fledge.train.vocabulary import draft_vocabulary
from fledge.train.warm_start import architecture_of, continue_from

DEFAULT_DRAFT_VOCAB = 32_000


@dataclass(frozen=True)
class EagleKind:
    """See `fledge.train.kinds.TrainingKind`."""

    draft_type: str

    def check(self, args: DraftSettings) -> None:
        if args.draft_config:
            read_overrides(Path(args.draft_config))
        if args.init_from:
            read_config(Path(args.init_from))

    def learning_rate(self, hidden_size: int) -> float:
        return min(1e-3, 0.4 / hidden_size)

    def make(self, args: DraftSettings, source: Source, first: Callable[[], Sequence[TargetRecord]]) -> BoundHead:
        """A fresh head (started from the target's rows and states) or one continued from --init-from."""
        config = draft_config(args, source)
        vocab = draft_vocabulary(config, source)
        draft = DraftModel(config, source.embedding)
        draft.set_vocab(vocab.d2t, vocab.t2d)
        if args.init_from:
            continue_from(draft, Path(args.init_from), source.head_weight, source.text_config.num_hidden_layers, first)
        else:
            draft.warm_start(source.head_weight, torch.cat([record.tap_hidden for record in first()]))
        return draft

    def module(self, draft: BoundHead, args: TrainSettings, source: Source) -> TTTModule:
        assert isinstance(draft, DraftModel)
        return TTTModule(
            draft, source.teacher_head, args.draft.ttt_steps, args.loss_settings(), source.teacher_rows,
            survival=args.draft.depth_survival, seed=args.trainer.seed,
            share=share_of_process(args.trainer, args.draft.sequence_parallel),
        )  # fmt: skip


def draft_config(args: DraftSettings, source: Source) -> DraftConfig:
    """Derived from the target, sizes overridden by a file or the head to continue, the vocabulary by its flag."""
    overrides: dict[str, Any] = {}
    if args.draft_config:
        overrides = read_overrides(Path(args.draft_config))
    elif args.init_from:
        overrides = architecture_of(Path(args.init_from), source.text_config.num_hidden_layers, args.draft_type)
    if args.draft_layers is not None:
        overrides["num_layers"] = args.draft_layers
    vocab_size = source.head_weight.shape[0]
    wanted = args.draft_vocab_size if args.draft_vocab_size is not None else overrides.pop("draft_vocab_size", None)
    overrides.pop("draft_vocab_size", None)
    size = DEFAULT_DRAFT_VOCAB if wanted is None else (wanted or vocab_size)
    config = derive(
        source.text_config, vocab_size=vocab_size, tap_layers=source.tap_layers, draft_vocab_size=size,
        eagle31=args.draft_type == "eagle3.1", overrides=overrides,
    )  # fmt: skip
    if config.sliding_window is not None and config.sliding_window <= args.ttt_steps:
        raise UserError(
            f"--init-from {args.init_from}: its attention reaches {config.sliding_window} positions back, which must "
            f"be more than --ttt-steps {args.ttt_steps}. Give fewer steps."
        )
    return config
