"""A block draft's shape, derived from the target, and its config.json.

One network has two names. Without a Markov head it is DFlash (z-lab, arXiv 2602.06036), with one DSpark (DeepSeek).
Files name taps by the *outputs* of decoder layers, fledge by the inputs of the layers behind them: one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fledge.drafters.layer_config import (
    HINT,
    JSON,
    SIZES,
    SIZES_HINT,
    LayerConfig,
    LayerFields,
    layer_json,
    layer_of_document,
    layer_of_target,
)
from fledge.errors import UserError, nearest
from fledge.parsing import convert, read_json
from fledge.ranges import Count

DFLASH, DSPARK = "DFlashDraftModel", "Qwen3DSparkModel"  # what vLLM calls them
DraftType = Literal["dflash", "dspark"]
BLOCK_SIZES = {"dflash": 16, "dspark": 7}  # of the published drafts
MARKOV_RANK = 256
MOST_LAYERS = 5  # as published for targets of 36 layers; smaller targets get fewer


@dataclass(frozen=True, kw_only=True)
class BlockConfig(LayerConfig):
    """Decoder layers that draft a block of tokens in one pass, each slot seeing the target's states as keys."""

    block_size: int
    """Slots of a block: an anchor token and mask tokens"""
    mask_token_id: int
    sample_from_anchor: bool
    """The anchor's slot drafts the token behind the anchor (DSpark); False: each slot drafts the token at its own
    place, and the anchor's none (DFlash)"""
    markov_rank: int = 0
    """Of the head that adds log-odds by the previous token; 0: none"""
    confidence: bool = False
    """A head that says how likely a draft is to be accepted"""
    causal: bool = False
    """Slots see the earlier slots of their block only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_drafts < 1 or self.markov_rank < 0:
            raise UserError(
                f"draft config: block_size={self.block_size}, markov_rank={self.markov_rank}: needed are a slot that "
                f"drafts and a rank of at least 0."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"draft config: mask_token_id={self.mask_token_id} is no row of the target's embedding "
                f"(0..{self.vocab_size - 1})."
            )
        if self.tap_layers[0] < 1:
            raise UserError(
                f"draft config: tap layers {list(self.tap_layers)}: the input of layer 0 is no layer's output, which "
                f"is how files of block drafts name taps. Give layers from 1 on."
            )

    @property
    def num_drafts(self) -> int:
        """Slots that draft a token."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def first_slot(self) -> int:
        """The slot that drafts the token behind the anchor."""
        return 0 if self.sample_from_anchor else 1


def spread_tap_layers(num_layers: int, num_taps: int) -> tuple[int, ...]:
    """Taps spread over a target's layers as DFlash has them: of 36 layers, five outputs 1, 9, 17, 25, 33."""
    if num_taps == 1:
        return (num_layers // 2 + 1,)
    outputs = {max(0, round(1 + tap * (num_layers - 4) / (num_taps - 1))) for tap in range(num_taps)}
    return tuple(sorted(output + 1 for output in outputs))


def usual_block_taps(num_layers: int) -> tuple[int, ...]:
    """Five, as published."""
    return spread_tap_layers(num_layers, 5)


def derive_block(
    text_config: Any, draft_type: DraftType, *, vocab_size: int, tap_layers: Sequence[int], mask_token_id: int,
    draft_vocab_size: int | None = None, overrides: dict[str, Any] | None = None,
) -> BlockConfig:  # fmt: skip
    """The config of a block draft for a target."""
    is_dspark = draft_type == "dspark"
    values: dict[str, Any] = {
        **layer_of_target(text_config, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size),
        "tap_layers": tuple(tap_layers),
        "num_layers": max(1, min(MOST_LAYERS, text_config.num_hidden_layers // 7)),
        "block_size": BLOCK_SIZES[draft_type],
        "mask_token_id": mask_token_id,
        "sample_from_anchor": is_dspark,
        "markov_rank": min(MARKOV_RANK, text_config.hidden_size) if is_dspark else 0,
        "confidence": is_dspark,
    }
    return BlockConfig(**{**values, **(overrides or {})})


# Keys of a config file -> our fields, for what may be chosen.
CHOICES = {
    **{name: name for name in SIZES}, "num_hidden_layers": "num_layers", "block_size": "block_size",
    "mask_token_id": "mask_token_id", "sample_from_anchor": "sample_from_anchor", "markov_rank": "markov_rank",
    "enable_confidence_head": "confidence", "causal": "causal", "sliding_window": "sliding_window",
}  # fmt: skip


def read_block_overrides(path: Path) -> dict[str, Any]:
    """What a draft config file chooses; what the target decides is not taken."""
    document = read_json(path, JSON, hint=SIZES_HINT)
    convert(document, BlockFields, str(path))
    convert(document, DflashFields, str(path))
    known = {*CHOICES, *BlockFields.__struct_fields__, *DflashFields.__struct_fields__, "model_type", "fledge"}
    for key in document:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, known)}.")
    inner = document.get("dflash_config") or {}
    found = {ours: inner.get(key, document.get(key)) for key, ours in CHOICES.items()}
    return {ours: value for ours, value in found.items() if value is not None}


def to_json(config: BlockConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json as vLLM reads it; the z-lab layout, which SGLang reads, is part of it."""
    taps = [layer - 1 for layer in config.tap_layers]
    layer_type = "full_attention" if config.sliding_window is None else "sliding_attention"
    dflash = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": taps,
        "sample_from_anchor": config.sample_from_anchor,
        "causal": config.causal,
    }
    return {
        "architectures": [DSPARK if config.markov_rank else DFLASH],
        "model_type": "qwen3",
        **layer_json(config, dtype=dtype),
        "layer_types": [layer_type] * config.num_layers,
        "num_target_layers": config.target_layers,
        "block_size": config.block_size,
        "dflash_config": dflash,
        **{key: dflash[key] for key in ("mask_token_id", "target_layer_ids", "sample_from_anchor")},
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": bool(config.confidence and config.markov_rank),
        "fledge": {"target_layers": config.target_layers},
    }  # fmt: skip


OutputIds = Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]


class DflashFields(msgspec.Struct):
    """What a file says of the block, in `dflash_config` or beside it."""

    block_size: Count | None = None
    mask_token_id: int | None = None
    target_layer_ids: OutputIds | None = None
    sample_from_anchor: bool | None = None
    causal: bool | None = None


class BlockFields(LayerFields):
    """The whole document."""

    architectures: list[str] | None = None
    draft_vocab_size: Count | None = None
    num_target_layers: Count | None = None
    dflash_config: DflashFields | None = None
    markov_rank: int | None = None
    markov_head_type: str | None = None
    enable_confidence_head: bool | None = None
    confidence_head_with_markov: bool | None = None


def is_block_document(document: dict[str, Any]) -> bool:
    """Whether a config.json is a block draft's."""
    return bool({DFLASH, DSPARK}.intersection(document.get("architectures") or ()))


def from_json(path: Path) -> BlockConfig:
    """Read a config.json in the layout of `to_json`."""
    return config_of_document(read_json(path, JSON, hint=HINT), path)


def config_of_document(document: JSON, path: Path) -> BlockConfig:
    """A config from a document in our form; `path` names its place in errors."""
    fields = convert(document, BlockFields, str(path))
    beside = convert(document, DflashFields, str(path))
    inner = fields.dflash_config or DflashFields()

    def stated(name: str) -> Any:
        value = getattr(inner, name)
        return getattr(beside, name) if value is None else value

    needed = ("block_size", "mask_token_id", "target_layer_ids", "sample_from_anchor")
    missing = [name for name in needed if stated(name) is None]
    missing += [
        name for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        if getattr(fields, name) is None
    ]  # fmt: skip
    if missing:
        raise UserError(
            f"{path}: {', '.join(missing)} missing. A block draft of another trainer is brought into this form by "
            f"`fledge convert`."
        )
    _refuse_inexpressible(fields, path)
    try:
        return BlockConfig(
            **layer_of_document(document),
            tap_layers=tuple(layer + 1 for layer in stated("target_layer_ids")),
            target_layers=fields.num_target_layers,
            num_layers=fields.num_hidden_layers or 0,
            block_size=stated("block_size"),
            mask_token_id=stated("mask_token_id"),
            sample_from_anchor=stated("sample_from_anchor"),
            markov_rank=fields.markov_rank or 0,
            confidence=bool(fields.enable_confidence_head),
            causal=bool(stated("causal")),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _refuse_inexpressible(fields: BlockFields, path: Path) -> None:
    if len(set(fields.layer_types or ())) > 1:
        raise UserError(
            f"{path}: layer_types {fields.layer_types} differ; fledge's block draft has one kind of attention in all "
            f"layers."
        )
    if fields.markov_rank and fields.markov_head_type not in (None, "vanilla"):
        raise UserError(f"{path}: markov_head_type={fields.markov_head_type!r}; fledge has the vanilla one.")
    if fields.enable_confidence_head and bool(fields.markov_rank) != bool(fields.confidence_head_with_markov):
        raise UserError(
            f"{path}: confidence_head_with_markov={fields.confidence_head_with_markov} beside markov_rank="
            f"{fields.markov_rank}; fledge's confidence head reads the Markov embedding where there is one."
        )
