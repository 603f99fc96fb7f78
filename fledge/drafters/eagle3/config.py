"""The draft head's shape, derived from the target's text config, and its JSON form (an EAGLE checkpoint's config.json).

Everything a head can get wrong in the wild is taken from the target here: rope (theta and scaling), head_dim, RMSNorm
epsilon, max_position_embeddings. A draft config file only overrides sizes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.drafters.eagle3.head_file import read_document
from fledge.drafters.eagle3.rope import check_rope, with_layout, without_axes
from fledge.errors import UserError, nearest

ARCHITECTURE = "LlamaForCausalLMEagle3"
ACTIVATIONS = ("silu", "swish")
READ_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM")  # EAGLE / SpecForge, AngelSlim
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "draft_vocab_size")


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """One decoder layer between three target states and a reduced vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the target's head."""
    draft_vocab_size: int
    tap_layers: tuple[int, ...]
    """tap layer i = input of decoder layer i of the target"""
    rope_parameters: dict[str, Any]
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    hidden_act: str = "silu"
    fc_norm: bool = False
    """EAGLE-3.1: one RMSNorm per tap before fc"""
    norm_output: bool = False
    """EAGLE-3.1: the state fed back to the next step is taken after the final norm"""
    norm_before_residual: bool = False
    """the residual is the normed feature (many heads of speculators; vLLM honours it, SGLang does not)"""
    sliding_window: int | None = None
    """Positions the draft's attention reaches back, the current one included; None: all"""
    target_layers: int | None = None
    """Decoder layers of the target; fixes what the tap ids mean"""

    def __post_init__(self) -> None:
        """What any head must be, whoever wrote its config."""
        sizes = (*SIZES, "hidden_size", "vocab_size", "max_position_embeddings")
        if bad := next((name for name in sizes if getattr(self, name) < 1), None):
            raise UserError(f"draft config: {bad}={getattr(self, bad)} must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"draft config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.draft_vocab_size > self.vocab_size:
            raise UserError(
                f"draft config: draft_vocab_size={self.draft_vocab_size} must lie in 1..{self.vocab_size}, the size of "
                f"the target's vocabulary. Lower draft_vocab_size."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"draft config: sliding_window={self.sliding_window} must be at least 1, or left out.")
        if not 0 < self.rms_norm_eps < 1:
            raise UserError(f"draft config: rms_norm_eps={self.rms_norm_eps} must be above 0 and below 1.")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"draft config: hidden_act={self.hidden_act!r}; the head's MLP is SwiGLU ({' or '.join(ACTIVATIONS)})."
            )
        self._check_taps()
        check_rope(self.rope_parameters, self.head_dim)

    def _check_taps(self) -> None:
        layers = self.target_layers
        taps = list(self.tap_layers)
        if not taps or taps[0] < 0 or taps != sorted(set(taps)) or (layers is not None and taps[-1] >= layers):
            of = f"a target of {layers} layers" if layers is not None else "the target"
            raise UserError(
                f"draft config: tap layers {taps} are not distinct, ascending layers of {of} (counted from 0, each "
                f"named by its input)."
            )

    @property
    def full_vocab(self) -> bool:
        """True when draft ids are target ids; d2t and t2d are then omitted from checkpoints."""
        return self.draft_vocab_size == self.vocab_size

    def rotary_config(self) -> Any:
        """The transformers config of the draft's rotary embedding.

        Llama's rotary embedding turns whole heads, whatever `partial_rotary_factor` says: it gets the turned part. A
        "proportional" rope (Gemma 4) spreads its frequencies over the whole head and stands still in the rest of it.
        """
        from transformers import LlamaConfig

        rope, turned = without_axes(self.rope_parameters), self.head_dim
        if rope.get("rope_type") != "proportional":
            turned = int(self.head_dim * (rope.pop("partial_rotary_factor", None) or 1.0))
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=turned,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=rope,
        )


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
    heads, kv_heads, head_dim = _attention_shape(text_config)
    values: dict[str, Any] = {
        "hidden_size": text_config.hidden_size,
        "intermediate_size": _intermediate_size(text_config),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": min(draft_vocab_size or vocab_size, vocab_size),
        "tap_layers": tuple(tap_layers),
        "rope_parameters": rope_of(text_config),
        "rms_norm_eps": _norm_eps(text_config),
        "max_position_embeddings": getattr(text_config, "max_position_embeddings", 8192),
        "fc_norm": eagle31,
        "norm_output": eagle31,
        "target_layers": text_config.num_hidden_layers,
    }
    return DraftConfig(**{**values, **(overrides or {})})


def read_overrides(path: Path) -> dict[str, Any]:
    """The sizes a draft config file (ours, AngelSlim's, SpecForge's) sets; what the target decides is not taken."""
    document = read_document(path)
    fields = {field.name for field in dataclasses.fields(DraftConfig)}
    for key in document:
        if key not in fields | KNOWN_EXTRA:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, fields | KNOWN_EXTRA)}.")
    overrides = {key: document[key] for key in SIZES if document.get(key) is not None}
    for flag in ("fc_norm", "norm_output", "norm_before_residual"):
        if flag in document:
            overrides[flag] = bool(document[flag])
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
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    share = rope.get("partial_rotary_factor")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "rope_parameters": rope,
        **({"partial_rotary_factor": share} if share is not None else {}),  # SGLang reads it here only
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": dtype,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        **({"norm_before_residual": True} if config.norm_before_residual else {}),
        **_window_json(config),
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
    if document.get("num_hidden_layers") not in (1, None):
        raise UserError(f"{path}: num_hidden_layers={document['num_hidden_layers']}; a head has one decoder layer.")
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
        **{name: document[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")},
        "num_key_value_heads": document.get("num_key_value_heads") or document["num_attention_heads"],
        "head_dim": document.get("head_dim") or document["hidden_size"] // document["num_attention_heads"],
        "draft_vocab_size": document.get("draft_vocab_size") or document["vocab_size"],
        "rope_parameters": rope_of_document(document),
        "rms_norm_eps": document.get("rms_norm_eps") or 1e-6,
        "max_position_embeddings": document.get("max_position_embeddings") or 8192,
        "hidden_act": "silu" if document.get("hidden_act") is None else document["hidden_act"],
        "fc_norm": bool(document.get("fc_norm")),
        "norm_output": bool(document.get("norm_output")),
        "norm_before_residual": bool(document.get("norm_before_residual")),
        "sliding_window": window_of_document(document),
    }
    try:
        return DraftConfig(**{**values, **known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _window_json(config: DraftConfig) -> dict[str, Any]:
    """The window as transformers' Llama-like configs say it; nothing where there is none."""
    if config.sliding_window is None:
        return {}
    return {"sliding_window": config.sliding_window, "use_sliding_window": True, "layer_types": ["sliding_attention"]}


def window_of_document(document: dict[str, Any]) -> int | None:
    """The window of the draft's attention: stated, and said to be used."""
    return document.get("sliding_window") if "sliding_attention" in (document.get("layer_types") or []) else None


def rope_of(text_config: Any) -> dict[str, Any]:
    """The target's rope as transformers' `rope_parameters`; of several layer types, the full-attention one."""
    rope = getattr(text_config, "rope_parameters", None)
    if not rope:
        return {"rope_type": "default", "rope_theta": getattr(text_config, "rope_theta", 10_000.0)}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    rope = {"rope_type": "default", **rope}
    if rope["rope_type"] == "dynamic" and rope.get("alpha"):
        # Hunyuan: "dynamic" by name, but a fixed stretch of the base. Said this way, every engine computes the same.
        head_dim = _attention_shape(text_config)[2]
        rope_theta = rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2))
        sections = {"mrope_section": rope["mrope_section"]} if rope.get("mrope_section") else {}
        rope = {"rope_type": "default", "rope_theta": rope_theta, **sections}
    if text_config.__dict__.get("kv_lora_rank") or getattr(text_config, "kv_lora_rank", None):
        rope.pop("partial_rotary_factor", None)  # latent attention rotates a slice of its own; the draft is plain
    return with_layout(rope, text_config.model_type)


def _attention_shape(config: Any) -> tuple[int, int, int]:
    """(heads, kv heads, head_dim). Latent attention (DeepSeek) has no kv heads to copy: plain GQA of head_dim 128."""
    if getattr(config, "kv_lora_rank", None):
        head_dim = next((size for size in (128, 64, 32, 16) if config.hidden_size % size == 0), config.hidden_size)
        heads = config.hidden_size // head_dim
        return heads, heads // 4 if heads % 4 == 0 else heads, head_dim
    config = one_layer(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def one_layer(config: Any) -> Any:
    """The config of the last layer, where layers differ (Gemma 4): the library then refuses to answer for all."""
    return config.per_layer_config[-1] if getattr(config, "per_layer_config", None) else config


def _intermediate_size(config: Any) -> int:
    """Width of the MLP; the largest where layers differ (Gemma 3n)."""
    size = getattr(one_layer(config), "intermediate_size", None)
    return max(size) if isinstance(size, (list, tuple)) else size or 4 * config.hidden_size


def _norm_eps(config: Any) -> float:
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 1e-6


def rope_of_document(document: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a config.json, whichever of the three ways it states its rope (ModelOpt: inside scaling)."""
    share = document.get("partial_rotary_factor")
    shared = {"rope_type": "default", **({} if share is None else {"partial_rotary_factor": share})}
    if document.get("rope_parameters"):
        return {**shared, **document["rope_parameters"]}
    scaling = dict(document.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    theta = document.get("rope_theta")
    return {**shared, "rope_theta": 10_000.0 if theta is None else theta, **scaling}
