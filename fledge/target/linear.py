"""A head's matrix product: what every decoding round and every chunk of the training loss pays for.

In fp32 on a CPU, PyTorch's product (MKL) of 2 to 10 rows with a large matrix takes far longer than the memory needs;
oneDNN's, which PyTorch has for bf16 and compiled models, does not. One core, 49152 x 576 weights, milliseconds:

    rows        1      2      3      4      8      10
    F.linear    10.2   24.3   35.7   17.5   19.9   21.4
    oneDNN      8.6    11.0   11.2   11.6   13.6   14.4

With many rows it is still 1.05 to 1.6 times as fast (dev/log). Small matrices gain nothing at few rows. Other
dtypes and devices and gradients take F.linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_OUTPUTS = 4096


def head_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(hidden (.., H), weight (V, H), bias (V,)), by oneDNN where that is faster."""
    if (
        hidden.dtype != torch.float32
        or hidden.device.type != "cpu"
        or weight.shape[0] < LEAST_OUTPUTS
        or torch.is_grad_enabled()
        or not _whole(weight)
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(hidden, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden.contiguous(), weight, bias, "none", [], "")


def head_logits(head: nn.Module, last_hidden: Tensor) -> Tensor:
    """(.., H) -> (.., V) by a model's output embedding; anything but a plain nn.Linear computes for itself."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or not _whole(head.weight):
        return head(last_hidden)
    return head_linear(last_hidden, head.weight, head.bias)


def _whole(weight: Tensor) -> bool:
    """Not one process's part of a tensor, nor any other kind with rules of its own."""
    return type(weight.data) is Tensor
