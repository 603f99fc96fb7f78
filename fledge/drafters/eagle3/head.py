"""A head without its target: a config and tensors in our names, and everything that must hold between the two.

`DraftModel` is a head bound to a target's embedding and ready to run; this is the same head as data, for those who
convert, export, examine or repair it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.drafters.eagle3.config import DraftConfig, from_json
from fledge.errors import UserError

WEIGHTS = "model.safetensors"
EMBEDDING = "embed_tokens.weight"
"""(V, H) token embedding of the few heads that trained one of their own; others read the target's."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Head:
    """A head in our names."""

    config: DraftConfig
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["fc.weight"].dtype

    @property
    def target_ids(self) -> Tensor:
        """(D,) target ids the head may propose."""
        draft_ids = torch.arange(self.config.draft_vocab_size)
        return draft_ids if self.config.full_vocab else draft_ids + self.tensors["d2t"]


def read_head(folder: Path) -> Head:
    """A head of ours (the EAGLE layout), complete and consistent."""
    head = Head(from_json(folder / "config.json"), read_tensors(folder / WEIGHTS))
    check_head(head, folder)
    return head


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete head."""
    size, inner, taps = config.hidden_size, config.intermediate_size, len(config.tap_layers)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, taps * size),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * size),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, q),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        "lm_head.weight": (config.draft_vocab_size, size),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{tap}.weight": (size,) for tap in range(taps)}
    if not config.full_vocab:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def check_head(head: Head, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, finite, d2t and t2d each other's inverse."""
    check_tensors(head, folder)
    if not head.config.full_vocab:
        check_vocab(head.tensors["d2t"], head.tensors["t2d"], source=str(folder))


def check_tensors(head: Head, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, real numbers, finite; a rope that gives frequencies."""
    expected = expected_shapes(head.config)
    if EMBEDDING in head.tensors:
        expected[EMBEDDING] = (head.config.vocab_size, head.config.hidden_size)
    missing, unknown = sorted(expected.keys() - head.tensors.keys()), sorted(head.tensors.keys() - expected.keys())
    if missing or unknown:
        lists = (("missing", missing), ("unknown", unknown))
        parts = [f"{word}: {', '.join(names[:4])}{', ...' if names[4:] else ''}" for word, names in lists if names]
        raise UserError(
            f"{folder}: not the tensors of an EAGLE-3 head ({'; '.join(parts)}). Export the head again; one of another "
            f"trainer is brought into this form by `fledge convert`."
        )
    for name, shape in expected.items():
        tensor = head.tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, its config.json asks for {shape}.")
        if name not in ("d2t", "t2d") and tensor.dtype not in FLOATS:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise UserError(f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}; weights are {kinds}.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} contains NaN or infinity. Use an earlier checkpoint.")
    _check_frequencies(head.config, folder)


def _check_frequencies(config: DraftConfig, folder: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        frequencies = LlamaRotaryEmbedding(config.rotary_config()).inv_freq
    except Exception as error:  # transformers checks little: a key of the rope may be absent, unknown or of any type
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder}: its rope {config.rope_parameters} cannot be used ({problem}).") from None
    if not bool((frequencies.isfinite() & (frequencies >= 0)).all()):
        raise UserError(f"{folder}: its rope {config.rope_parameters} gives no finite frequencies.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a missing or truncated file is a user error."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. The head's folder must hold {WEIGHTS}.")
    try:
        return load_file(str(path))
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or export the head again.") from None
