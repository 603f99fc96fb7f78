"""Norm and MLP of the draft's layer, with backwards that keep little.

Autograd keeps what every operation read. For a norm on CPU that is its input in fp32 once more, for the gated product
two extra copies of the widest activations there are. Both are cheap to make again, so here only the inputs are kept,
which others hold anyway. `F.rms_norm` and plain autograd are the slow twins in the tests.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.drafters.products import linear, product


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, with the statistics in fp32, whatever autocast would do."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight, eps = self.weight.to(hidden.dtype), self.eps or 0.0
            if hidden.device.type == "cpu" and torch.is_grad_enabled():
                return _Norm.apply(hidden, weight, eps)
            return F.rms_norm(hidden, self.normalized_shape, weight, eps)  # fused on CUDA


class _Norm(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * weight, keeping x and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        unit = hidden.float() * scale
        grad = grads[0].float()
        grad_weight = (grad * unit).reshape(-1, grad.shape[-1]).sum(0)
        grad = grad * weight
        inner = (grad * unit).mean(-1, keepdim=True)
        grad_hidden = grad.sub_(unit.mul_(inner)).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = linear(hidden, self.gate_proj.weight), linear(hidden, self.up_proj.weight)
        if not torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return _GatedProduct.apply(gate, up, self.down_proj.weight)


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, keeping gate and up: the product is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        opened = F.silu(gate).mul_(up)
        return product(opened.reshape(-1, opened.shape[-1]), weight.to(gate.dtype)).view(
            *gate.shape[:-1], weight.shape[0]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0]
        opened = F.silu(gate)
        gated = opened * up
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.T @ gated.reshape(-1, gated.shape[-1])
        grad_product = product(flat, weight.to(grad.dtype).T).view_as(gate)
        torch.mul(grad_product, up, out=gated)  # the gradient of silu(gate)
        grad_gate = torch.ops.aten.silu_backward(gated, gate)
        return grad_gate, grad_product.mul_(opened), grad_weight.to(weight.dtype)
