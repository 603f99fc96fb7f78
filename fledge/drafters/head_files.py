"""A draft's folder, whatever its network: config.json beside safetensors, written whole and read with care."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.drafters.bound_head import BoundHead
from fledge.drafters.layer_config import LayerConfig
from fledge.errors import UserError, naming
from fledge.outputs import staged, write_json
from fledge.target.quantised import FLOATS

WEIGHTS = "model.safetensors"
EMBEDDING = "embed_tokens.weight"
"""(V, H) token embedding of the few heads that trained one of their own; others read the target's."""


def save_draft(
    model: BoundHead, folder: Path, *, dtype: torch.dtype = torch.bfloat16, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the head so that fledge and engines load it. An earlier head there is replaced as a whole.

    `weights` replaces the model's own parameters where they are sharded over ranks and were gathered elsewhere.
    """
    tensors = draft_tensors(model, dtype)
    gathered = {name: weight for name, weight in (weights or {}).items() if name in tensors}
    tensors |= {name: weight.to("cpu", tensors[name].dtype).contiguous() for name, weight in gathered.items()}
    with staged(folder) as building:
        with naming(folder / WEIGHTS, needed_bytes=sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, str(building / WEIGHTS), metadata={"format": "pt"})
        write_json(building / "config.json", model.document(str(dtype).removeprefix("torch.")))


def draft_tensors(model: BoundHead, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's tensors: trained weights in `dtype`, d2t and t2d unless the vocabulary is whole."""
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    if not model.config.full_vocab:
        tensors |= {"d2t": model.d2t.cpu().contiguous(), "t2d": model.t2d.cpu().contiguous()}
    if model.owns_embedding:
        tensors[EMBEDDING] = model.embedding.to("cpu", dtype).contiguous()
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a missing or truncated file is a user error."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. The head's folder must hold {WEIGHTS}.")
    try:
        return load_file(str(path))
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or export the head again.") from None


def check_tensors(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], config: LayerConfig, folder: Path, what: str
) -> None:
    """Complete, nothing unknown, right shapes, real numbers, finite; a rope that gives frequencies."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        lists = (("missing", missing), ("unknown", unknown))
        parts = [f"{word}: {', '.join(names[:4])}{', ...' if names[4:] else ''}" for word, names in lists if names]
        raise UserError(
            f"{folder}: not the tensors of {what} ({'; '.join(parts)}). Export the head again; one of another "
            f"trainer is brought into this form by `fledge convert`."
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, its config.json asks for {shape}.")
        if name not in ("d2t", "t2d") and tensor.dtype not in FLOATS:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise UserError(f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}; weights are {kinds}.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} contains NaN or infinity. Use an earlier checkpoint.")
    _check_frequencies(config, folder)


def _check_frequencies(config: LayerConfig, folder: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        frequencies = LlamaRotaryEmbedding(config.rotary_config()).inv_freq
    except Exception as error:  # transformers checks little: a key of the rope may be absent, unknown or of any type
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder}: its rope {config.rope_parameters} cannot be used ({problem}).") from None
    if not bool((frequencies.isfinite() & (frequencies >= 0)).all()):
        raise UserError(f"{folder}: its rope {config.rope_parameters} gives no finite frequencies.")


def match_target(config: LayerConfig, embedding: Tensor, folder: Path) -> None:
    vocab_size, hidden_size = embedding.shape
    if config.vocab_size != vocab_size or config.hidden_size != hidden_size:
        raise UserError(
            f"{folder}: the head is for a target with vocabulary {config.vocab_size} and hidden size "
            f"{config.hidden_size}; this target has {vocab_size} and {hidden_size}. Use the head's own target, or "
            f"train a head for this one."
        )
