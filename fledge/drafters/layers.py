"""Norm, MLP and rotary embedding of a draft's layers. Their backwards keep little (`fledge.drafters.cpu_kernels`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.drafters.cpu_kernels import gated_linear, rms_norm, through
from fledge.target import native


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, with the statistics in fp32, whatever autocast would do."""

    def forward(self, hidden: Tensor) -> Tensor:
        found = native.rms_norm(hidden, self.weight, self.eps or 0.0)
        if found is not None:
            return found
        with torch.autocast(hidden.device.type, enabled=False):
            return rms_norm(hidden, self.weight.to(hidden.dtype), self.eps or 0.0)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = through(self.gate_proj, hidden), through(self.up_proj, hidden)
        if not torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return gated_linear(gate, up, self.down_proj.weight)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: states (.., heads, d), cos and sin (.., R) with R <= d."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(states.dtype), sin.unsqueeze(-2).to(states.dtype)
    turned, kept = states[..., :rotary_dim], states[..., rotary_dim:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if kept.shape[-1] == 0 else torch.cat((turned, kept), dim=-1)
