"""The draft head's shape, derived from the target's text config, and its JSON form (an EAGLE checkpoint's config.json).

What a target decides is taken from it (`fledge.drafters.layer_config`). A draft config file only overrides sizes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.drafters.eagle3.head_file import read_document
from fledge.drafters.layer_config import SIZES, SIZES_HINT, LayerConfig, layer_json, layer_of_document, layer_of_target
from fledge.errors import UserError, nearest

ARCHITECTURE = "LlamaForCausalLMEagle3"
QWEN3 = "Eagle3Qwen3ForCausalLM"  # vLLM's head of a Qwen3 layer: Llama's with queries and keys normed by head
READ_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", QWEN3)  # EAGLE / SpecForge, AngelSlim, vLLM


@dataclass(frozen=True, kw_only=True)
class DraftConfig(LayerConfig):
    """Decoder layers, one as a rule, between three target states and a reduced vocabulary."""

    fc_norm: bool = False
    """EAGLE-3.1: one RMSNorm per tap before fc"""
    norm_output: bool = False
    """EAGLE-3.1: the state fed back to the next step is taken after the final norm"""
    norm_before_residual: bool = False
    """the residual is the normed feature (many heads of speculators; vLLM honours it, SGLang does not)"""
    qk_norm: bool = False
    """Qwen3's layer: queries and keys are normed by head before they turn (vLLM reads such heads, SGLang does not)"""


def derive(
    text_config: Any,
    *,
    vocab_size: int,
    tap_layers: Sequence[int],
    draft_vocab_size: int | None = 32_000,
    eagle31: bool = False,
    overrides: dict[str, Any] | None = None,
) -> DraftConfig:
    """The draft config for a target. draft_vocab_size None (or beyond the vocabulary) keeps the whole vocabulary."""
    values: dict[str, Any] = {
        **layer_of_target(text_config, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size),
        "tap_layers": tuple(tap_layers),
        "fc_norm": eagle31,
        "norm_output": eagle31,
    }
    return DraftConfig(**{**values, **(overrides or {})})


def read_overrides(path: Path) -> dict[str, Any]:
    """The sizes a draft config file (ours, AngelSlim's, SpecForge's) sets; what the target decides is not taken."""
    document = read_document(path, SIZES_HINT)
    fields = {field.name for field in dataclasses.fields(DraftConfig)}
    for key in document:
        if key not in fields | KNOWN_EXTRA:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, fields | KNOWN_EXTRA)}.")
    overrides = {key: document[key] for key in SIZES if document.get(key) is not None}
    for flag in ("fc_norm", "norm_output", "norm_before_residual", "qk_norm"):
        if flag in document:
            overrides[flag] = bool(document[flag])
    if document.get("num_hidden_layers"):
        overrides["num_layers"] = document["num_hidden_layers"]
    return overrides


# Keys of the usual Llama-style draft config that say nothing the target does not say better.
KNOWN_EXTRA = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "dtype",
    "torch_dtype", "transformers_version", "use_cache", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "num_hidden_layers", "attention_bias", "attention_dropout", "mlp_bias", "pretraining_tp", "max_window_layers",
    "sliding_window", "use_sliding_window", "eagle_config", "eagle_aux_hidden_state_layer_ids", "target_hidden_size",
    "target_model_type", "modal_type", "norm_before_residual", "layer_types", "mrope_section",
    "partial_rotary_factor", "fledge",
}  # fmt: skip


def to_json(config: DraftConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json in the EAGLE layout: what vLLM and SGLang read, with tap ids as *inputs* of decoder layers."""
    windowed = config.sliding_window is not None
    return {
        "architectures": [QWEN3 if config.qk_norm else ARCHITECTURE],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **layer_json(config, dtype=dtype),
        "target_hidden_size": config.hidden_size,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        **({"norm_before_residual": True} if config.norm_before_residual else {}),
        **({"layer_types": ["sliding_attention"] * config.num_layers} if windowed else {}),
        "eagle_aux_hidden_state_layer_ids": list(config.tap_layers),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(config.tap_layers),
        },
        "fledge": {"tap_convention": "input of decoder layer i", "target_layers": config.target_layers},
    }


def from_json(path: Path) -> DraftConfig:
    """Read a config.json in the EAGLE layout written by fledge (tap ids name layer *inputs*)."""
    document = read_document(path)
    architecture = (document.get("architectures") or ["?"])[0]
    if architecture not in READ_ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture!r} is no EAGLE-3 head fledge reads ({', '.join(READ_ARCHITECTURES)}). "
            f"Convert it first with `fledge convert`."
        )
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    missing = [key for key in needed if document.get(key) is None]
    taps = document.get("eagle_aux_hidden_state_layer_ids") or (document.get("eagle_config") or {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    if missing or not taps:
        raise UserError(
            f"{path}: missing {', '.join(missing or ['eagle_aux_hidden_state_layer_ids'])}. A head of another trainer "
            f"is brought into this form by `fledge convert`."
        )
    mark = document.get("fledge")
    if mark is None:
        raise UserError(
            f"{path}: another trainer's head: whether its tap ids {list(taps)} are inputs or outputs of layers, its "
            f"config does not say. `fledge convert HEAD --target TARGET --output-dir OUT` settles it."
        )
    if str(mark.get("tap_convention", "")).startswith("output"):  # our export for SGLang
        taps = [layer + 1 for layer in taps]
    return config_of_fields(document, path, tap_layers=tuple(taps), target_layers=mark.get("target_layers"))


def config_of_fields(document: dict[str, Any], path: Path, **known: Any) -> DraftConfig:
    """A config from the fields that every layout spells alike; `known` are those it does not, or that need more."""
    values = {
        **layer_of_document(document),
        "num_layers": document.get("num_hidden_layers") or 1,
        "fc_norm": bool(document.get("fc_norm")),
        "norm_output": bool(document.get("norm_output")),
        "norm_before_residual": bool(document.get("norm_before_residual")),
        "qk_norm": QWEN3 in (document.get("architectures") or ()),
    }
    try:
        return DraftConfig(**{**values, **known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
