"""Targets whose weights are quantised: their embedding and head as plain matrices, made once; what to say where the
library cannot load them.

Knows no format. A layer is asked what it computes: a head of the identity, an embedding of all its tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fledge.errors import UserError

BLOCK = 128  # rows and columns of a block with one scale, in every FP8 format that has blocks
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def method_of(config: Any) -> str | None:
    """How the weights are quantised, as config.json calls it; None where they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    found = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(found, "value", found) or "a method that its config does not name")


def not_loadable(name: str, method: str, reason: str) -> UserError:
    """A quantised target that transformers cannot load here."""
    return UserError(
        f"{name}: its weights are quantised ({method}), and transformers cannot load them here ({reason}). Install "
        f"what it names, give the unquantised checkpoint, or let a vLLM server run it: --target_backend vllm --server "
        f"URL."
    )


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The layer's own matrix, unless it is quantised."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dtype in FLOATS and weight.dim() == 2 else None


@torch.inference_mode(False)
@torch.no_grad()
def head_matrix(head: nn.Module, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(V, H) of a quantised output embedding: what it makes of the identity."""
    rows = head(torch.eye(hidden_size, dtype=dtype, device=device))
    bias = getattr(head, "bias", None)
    return (rows if bias is None else rows - bias).T.contiguous()


@torch.inference_mode(False)
@torch.no_grad()
def embedding_matrix(embedding: nn.Module, vocab_size: int, device: torch.device) -> Tensor:
    """(V, H) of a quantised input embedding: the rows of all tokens."""
    return embedding(torch.arange(vocab_size, device=device))


def stored_matrix(file: Any, key: str, where: str) -> Tensor:
    """A tensor of a checkpoint's file; FP8 is multiplied by the scales beside it (one, one a row, or one a block)."""
    tensor = file.get_tensor(key)
    if tensor.dtype in FLOATS:
        return tensor
    names = [f"{key}_scale_inv", f"{key}_scale"]
    scale_key = next((name for name in names if name in file.keys()), None)  # noqa: SIM118 - not a dict
    if not tensor.is_floating_point() or scale_key is None:
        raise UserError(
            f"{where}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}, quantised in a way that is not "
            f"read from the file. Give the unquantised checkpoint, or train online (--data), where the model is asked."
        )
    scale = file.get_tensor(scale_key).float()
    if scale.dim() < 2:
        return tensor.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    rows, columns = (_repeats(size, count) for size, count in zip(tensor.shape, scale.shape, strict=True))
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]


def _repeats(size: int, count: int) -> int:
    """Rows (or columns) that one of `count` scales stands for: one, all, or a block."""
    if count in (1, size):
        return size // count
    assert -(-size // BLOCK) == count, f"{size=} {count=}"
    return BLOCK
