"""What the config of every trained draft says, whatever its network: sizes, taps, rope, and what must hold of them.

Everything a head can get wrong in the wild is taken from the target here: rope (theta and scaling), head_dim, RMSNorm
epsilon, max_position_embeddings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fledge.drafters.rope import check_rope, with_layout, without_axes
from fledge.errors import UserError
from fledge.parsing import read_json
from fledge.ranges import Count, Positive

JSON = dict[str, Any]
HINT = "A head is a folder with config.json and its weights."
SIZES_HINT = "A draft config is a JSON file with sizes of the draft, such as those in configs/draft."
ACTIVATIONS = ("silu", "swish")
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "draft_vocab_size")


def refuse_other_target(path: Path, text_config: Any) -> None:
    """A draft config file names its target's sizes, which are taken from the target: they must be the same."""
    document = read_json(path, JSON, hint=SIZES_HINT)
    found = {
        "hidden_size": document.get("target_hidden_size") or document.get("hidden_size"),
        "vocab_size": document.get("vocab_size"),
    }
    for name, value in found.items():
        if value is not None and value != getattr(text_config, name):
            raise UserError(
                f"{path}: was made for another target: its {name} is {value}, this target's "
                f"{getattr(text_config, name)}. Give the file of this target, or none: the sizes are then derived."
            )


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Llama-like decoder layers between target states and a vocabulary."""

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
    num_layers: int = 1
    """Decoder layers"""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    hidden_act: str = "silu"
    sliding_window: int | None = None
    """Positions the draft's attention reaches back, the current one included; None: all"""
    target_layers: int | None = None
    """Decoder layers of the target; fixes what the tap ids mean"""

    def __post_init__(self) -> None:
        """What any head must be, whoever wrote its config."""
        sizes = (*SIZES, "hidden_size", "num_layers", "vocab_size", "max_position_embeddings")
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


def layer_of_target(text_config: Any, *, vocab_size: int, draft_vocab_size: int | None) -> dict[str, Any]:
    """The fields of `LayerConfig` that a target decides, but for the taps."""
    heads, kv_heads, head_dim = attention_shape(text_config)
    return {
        "hidden_size": text_config.hidden_size,
        "intermediate_size": _intermediate_size(text_config),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": min(draft_vocab_size or vocab_size, vocab_size),
        "rope_parameters": rope_of(text_config),
        "rms_norm_eps": _norm_eps(text_config),
        "max_position_embeddings": getattr(text_config, "max_position_embeddings", 8192),
        "target_layers": text_config.num_hidden_layers,
    }


def layer_json(config: LayerConfig, *, dtype: str) -> dict[str, Any]:
    """What config.json says of any draft's layers, in the words of transformers' Llama-like configs."""
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    share = rope.get("partial_rotary_factor")
    window = {}
    if config.sliding_window is not None:
        window = {"sliding_window": config.sliding_window, "use_sliding_window": True}
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
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
        **window,
        "dtype": dtype,
    }


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
        head_dim = attention_shape(text_config)[2]
        rope_theta = rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2))
        sections = {"mrope_section": rope["mrope_section"]} if rope.get("mrope_section") else {}
        rope = {"rope_type": "default", "rope_theta": rope_theta, **sections}
    if text_config.__dict__.get("kv_lora_rank") or getattr(text_config, "kv_lora_rank", None):
        rope.pop("partial_rotary_factor", None)  # latent attention rotates a slice of its own; the draft is plain
    return with_layout(rope, text_config.model_type)


def attention_shape(config: Any) -> tuple[int, int, int]:
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


# -- config.json -------------------------------------------------------------------------------------------------------


class LayerFields(msgspec.Struct):
    """The decoder layer and its vocabulary."""

    hidden_size: Count | None = None
    target_hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count | None = None
    max_position_embeddings: Count | None = None
    rms_norm_eps: Positive | None = None
    hidden_act: str | None = None
    rope_theta: Positive | None = None
    rope_scaling: JSON | None = None
    rope_parameters: JSON | None = None
    layer_types: list[str] | None = None
    sliding_window: Count | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


TapIds = Annotated[list[int], msgspec.Meta(min_length=1)]


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


def window_of_document(document: dict[str, Any]) -> int | None:
    """The window of the draft's attention: stated, and said to be used."""
    return document.get("sliding_window") if "sliding_attention" in (document.get("layer_types") or []) else None


def layer_of_document(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of `LayerConfig` that every layout of a config.json spells alike: all but the taps."""
    return {
        **{name: document[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")},
        "num_key_value_heads": document.get("num_key_value_heads") or document["num_attention_heads"],
        "head_dim": document.get("head_dim") or document["hidden_size"] // document["num_attention_heads"],
        "draft_vocab_size": document.get("draft_vocab_size") or document["vocab_size"],
        "rope_parameters": rope_of_document(document),
        "rms_norm_eps": document.get("rms_norm_eps") or 1e-6,
        "max_position_embeddings": document.get("max_position_embeddings") or 8192,
        "hidden_act": "silu" if document.get("hidden_act") is None else document["hidden_act"],
        "sliding_window": window_of_document(document),
    }
