"""Norm and MLP of the draft's layer. Their backwards keep little (`fledge.drafters.cpu_kernels`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.drafters.cpu_kernels import gated_linear, rms_norm, through


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, with the statistics in fp32, whatever autocast would do."""

    def forward(self, hidden: Tensor) -> Tensor:
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
