"""Matrix products of training: in fp32 on a CPU by oneDNN, elsewhere as PyTorch does them.

PyTorch multiplies fp32 on a CPU with MKL. On the machine of dev/log (AMD, AVX-512) oneDNN, which PyTorch has for
bf16 and compiled models, is 1.05 to 1.6 times as fast at the shapes of a training step where the right factor is a
weight; a weight's gradient, whose factors are both transposed, MKL multiplies faster by 1.1. Knows no model.
`F.linear` is the slow twin.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 64  # rows: a CPU's library keeps half a MiB for every shape it has met, so callers fill up to multiples of this


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (R, X) @ right (C, X).T -> (R, C), without gradient; views may be transposed."""
    if _by_onednn(left) and right.dtype == left.dtype:
        return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), None, "none", [], "")
    return left @ right.T


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """F.linear(inputs (.., X), weight (C, X)), with gradients."""
    autocast = torch.is_autocast_enabled(inputs.device.type)
    if autocast or not torch.is_grad_enabled() or inputs.dtype != weight.dtype or not _by_onednn(inputs):
        return F.linear(inputs, weight)
    return _Linear.apply(inputs, weight)


def _dense(matrix: Tensor) -> Tensor:
    """oneDNN multiplies slices of a wider matrix by its reference code, a hundred times slower."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def _by_onednn(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and type(tensor.data) is Tensor  # not one process's part of a tensor
        and tensor.numel() > 0
        and torch.backends.mkldnn.is_available()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs.reshape(-1, inputs.shape[-1]), weight).view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inputs = product(grad, weight.T).view_as(inputs) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ inputs.reshape(-1, inputs.shape[-1]) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight
