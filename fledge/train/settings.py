"""What a head is trained on, and how: all but the Trainer's own arguments (`fledge.train.arguments`).

Not given is None or empty: what can be derived is derived, printed, and written beside the head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fledge.data.settings import LimitSettings, SampleSettings
from fledge.ranges import Count, Natural, PartialShare, PositiveShare
from fledge.servers.settings import BackendSettings
from fledge.target.settings import DtypeSettings, PrefillSettings, TapSettings

if TYPE_CHECKING:
    from fledge.target.record import TapChoice


@dataclass(frozen=True, kw_only=True)
class InputSettings(SampleSettings, LimitSettings, BackendSettings, DtypeSettings, PrefillSettings):
    """Where the training data comes from."""

    target: str | None = None
    """The target: a transformers model folder or hub name. Stored states know theirs."""
    data: tuple[str, ...] = ()
    """Conversations to train on: files, folders or hub names."""
    eval_data: tuple[str, ...] = ()
    """Conversations to evaluate on. Empty: --eval-fraction of the training data."""
    states: tuple[str, ...] = ()
    """Stored hidden states to train on (made by `fledge extract`). With --data: what the store lacks is added to it."""
    eval_states: tuple[str, ...] = ()
    """Stored hidden states to evaluate on."""
    eval_fraction: PartialShare = 0.0
    """Share of the conversations held out when no evaluation data is given."""
    lm_head_key: str | None = None
    """Name of the target head's tensor; not needed: the model is asked."""


@dataclass(frozen=True, kw_only=True)
class UnrollSettings:
    """The draft's kind and layers, and how far it is unrolled."""

    draft_type: Literal["eagle3", "eagle3.1", "dflash", "dspark"] = "eagle3"
    """eagle3.1 adds a norm per tap and post-norm feedback. dflash drafts a block of tokens in one pass; dspark adds a
    Markov head that ties them together."""
    draft_layers: Count | None = None
    """Decoder layers of the draft. None: one for EAGLE-3; for a block draft a seventh of the target's, at most five."""
    ttt_steps: Count = 7
    """Draft steps unrolled per position (training-time test)."""
    depth_survival: PositiveShare = 0.8  # dev/log, "Our recipe beside the common one, 40 questions a set"
    """Share of the positions that go on from one TTT step to the next, drawn at random. Their loss counts so much more,
    so that the expected gradient is that of all. 1: all, to full depth."""
    sequence_parallel: Count = 1
    """Processes that divide the rows of each sequence among them, for sequences that are too long for one GPU."""


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What dflash and dspark have instead of draft steps."""

    block_size: Count | None = None
    """Slots of a block. None: 16 for dflash, 7 for dspark."""
    num_anchors: Count = 512
    """Blocks trained of a sequence at a step, drawn at random."""
    block_loss: Literal["ce", "ce+tv", "kl"] | None = None
    """Cross-entropy, a tenth of it and total variation, or KL divergence. None: ce for dflash, ce+tv for dspark."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings(TapSettings, UnrollSettings, BlockSettings):
    """The draft head and its loss."""

    draft_config: str | None = None
    """JSON with sizes of the draft. None: derived from the target."""
    draft_vocab_size: Natural | None = None
    """Target tokens the draft may propose, most frequent first. 0: all. None: the config file's, else 32000."""
    init_from: str | None = None
    """Start from this head instead of a fresh one."""
    position_weights: Literal["fixed", "dynamic"] = "dynamic"
    """dynamic: what a step adds to the accept length that the draft expects. fixed: 0.8 ** k, in blocks exp(-k / 4)."""
    loss_average: Literal["sequence", "token"] = "sequence"
    """Mean within sequences first, or over all tokens."""
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the final head's file."""

    def taps(self) -> "TapChoice":
        """What a live target taps."""
        from fledge.drafters.dspark.config import usual_block_taps

        if self.tap_layers:
            return self.tap_layers
        return usual_block_taps if self.draft_type in ("dflash", "dspark") else None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation by real decoding; --eval_strategy and --eval_steps are for the loss."""

    eval_decode_steps: Natural = 0
    """Every so many steps, decode held-out prompts with the head as it is, and keep the best by tau in OUTPUT_DIR/best.
    0: never."""
    eval_decode_prompts: Count = 16
    """Held-out prompts to decode: first turns of the evaluation data."""
    eval_decode_load_best: bool = True
    """The final head is the best by tau rather than the last."""
