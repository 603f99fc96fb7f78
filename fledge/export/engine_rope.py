"""The rotary embedding each engine computes from a head's config.json, as numbers beside the one the head trained with.

Engines read the same fields and compute different ropes: SGLang takes the rotated share of a head from the top level of
config.json only and knows no `attention_factor`; both ignore a `factor` where transformers computes it from two
lengths. So nothing is compared by field names: `as_read` says in transformers' terms what an engine computes, and
frequencies and scale are compared as numbers. Read in vLLM 0.33.0 (layers/rotary_embedding) and SGLang 0.5.23
(models/llama.py, layers/rotary_embedding/factory.py); the tests run those sources where they are at hand.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.layer_config import rope_of_document
from fledge.drafters.rope import without_axes

JSON = dict[str, Any]
KNOWN = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class Rope:
    """What a rope does to a head of queries or keys, whatever it is called."""

    frequencies: tuple[Tensor, ...]
    """(R/2,) radians per position of each rotated pair; of longrope two, within the original length and beyond"""
    scale: float
    """Factor of cos and sin"""

    @property
    def rotary_dim(self) -> int:
        return 2 * self.frequencies[0].shape[0]

    def difference(self, other: "Rope") -> str | None:
        """What this rope does instead of the other, for people; None where nothing differs."""
        if self.rotary_dim != other.rotary_dim:
            return f"rotates {self.rotary_dim} dimensions of a head instead of {other.rotary_dim}"
        pairs = list(zip(self.frequencies, other.frequencies, strict=True))
        if wrong := [(a, b) for a, b in pairs if not torch.allclose(a, b, rtol=1e-4, atol=1e-12)]:
            a, b = wrong[0]
            worst = int(((a - b).abs() / b.clamp(min=1e-12)).argmax())
            return f"turns pair {worst} by {a[worst]:.3g} radians a position instead of {b[worst]:.3g}"
        if not math.isclose(self.scale, other.scale, rel_tol=1e-4):
            return f"scales cos and sin by {self.scale:.4g} instead of {other.scale:.4g}"
        return None


def trained_rope(config: DraftConfig) -> Rope:
    """The rope of the head in fledge: transformers' own numbers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config.rotary_config())
    frequencies: tuple[Tensor, ...] = (rotary.inv_freq,)
    if config.rope_parameters.get("rope_type") == "longrope":
        layer: Any = rotary.config
        beyond = layer.rope_parameters["original_max_position_embeddings"] + 1
        frequencies += (ROPE_INIT_FUNCTIONS["longrope"](layer, torch.device("cpu"), seq_len=beyond)[0],)
    return Rope(frequencies, rotary.attention_scaling)


def engine_rope(engine: str, document: JSON, config: DraftConfig) -> Rope:
    """The rope `engine` ("vllm" or "sglang") computes from the layer's part of config.json, read as `config`."""
    rope, factor = as_read(engine, document, config)
    read = trained_rope(dataclasses.replace(config, rope_parameters=rope))
    return dataclasses.replace(read, scale=read.scale * factor)


def rope_problem(engine: str, document: JSON, config: DraftConfig) -> str | None:
    """How an engine's rope differs from the head's, or None."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in KNOWN:
        return f"rope_type {kind!r} is not one it knows"
    difference = engine_rope(engine, document, config).difference(trained_rope(config))
    return f"it {difference}" if difference else None


def as_read(engine: str, document: JSON, config: DraftConfig) -> tuple[JSON, float]:
    """The rope parameters that make transformers compute what the engine does, and a factor of the scale."""
    rope, factor = without_axes(rope_of_document(document)), 1.0
    if engine == "sglang":
        share = document.get("partial_rotary_factor")
        rope["partial_rotary_factor"] = 1.0 if share is None else share
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        rope = _fixed_base(engine, rope, config)
    elif kind == "proportional":
        rope.pop("factor", None)
    elif kind == "yarn" and engine == "sglang":
        rope.pop("attention_factor", None)
        factor = rope.pop("attn_factor", 1.0)
    elif kind == "longrope":
        rope.pop("factor", None)
        rope["attention_factor"] = rope.get("short_mscale")  # None: from the two lengths
    return rope, factor


def _fixed_base(engine: str, rope: JSON, config: DraftConfig) -> JSON:
    """ "dynamic" as the engines have it: one base for all positions, where transformers stretches with the text."""
    dim = int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0))
    stretch, factor = 1.0, rope.get("factor") or 1.0
    if rope.get("alpha"):
        stretch = rope["alpha"]
    elif engine == "sglang":
        stretch = factor * factor - (factor - 1)
    base = rope["rope_theta"] * stretch ** (dim / (dim - 2))
    return {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": dim / config.head_dim}
