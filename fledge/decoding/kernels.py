"""A Triton kernel for the choice of tokens on a GPU. `least_kept_unsorted` of `accept.py` has the slow twin."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit(do_not_specialize=["cols"])
def _least_kept(probabilities, out, cols, top_p, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    probabilities += row * cols
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, cols, BLOCK):
        most = tl.maximum(most, tl.load(probabilities + first + c, mask=first + c < cols, other=0.0))
    low, high = tl.full((), 0, tl.int32), tl.max(most, 0).to(tl.int32, bitcast=True)
    for _ in range(31):
        middle = low + (high - low) // 2
        least = middle.to(tl.float32, bitcast=True)
        held = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, cols, BLOCK):
            p = tl.load(probabilities + first + c, mask=first + c < cols, other=0.0)
            held += tl.where(p > least, p, 0.0)
        inside = tl.sum(held, 0) < top_p
        low, high = tl.where(inside, low, middle + 1), tl.where(inside, middle, high)
    tl.store(out + row, high.to(tl.float32, bitcast=True))


def least_kept(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability in the nucleus of each row (R, V) float32: (R, 1)."""
    probabilities = probabilities.contiguous()
    out = torch.empty(len(probabilities), 1, dtype=torch.float32, device=probabilities.device)
    _least_kept[len(probabilities),](probabilities, out, probabilities.shape[1], top_p, BLOCK=BLOCK, num_warps=16)
    return out
