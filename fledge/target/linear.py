"""A head's matrix product: what every decoding round and every chunk of the training loss pays for.

In fp32 on a CPU, PyTorch's product (MKL) of 2 to 10 rows with a large matrix takes far longer than reading the matrix
does. The product of oneDNN, which PyTorch has for bf16 and compiled models, does not. One core, 49152 x 576 weights,
milliseconds:

    rows        1      2      3      4      8      10
    F.linear    10.2   24.3   35.7   17.5   19.9   21.4
    oneDNN      8.6    11.0   11.2   11.6   13.6   14.4

With many rows it is still 1.05 to 1.6 times as fast (dev/log, "The four sets with the whole-file head"). Small matrices
gain nothing at few rows. Other dtypes and devices and gradients take F.linear. Training multiplies by
`fledge.drafters.cpu_kernels`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.target import gpu_products

LEAST_OUTPUTS = 4096
WIDENED_ROWS = 16  # of bf16, from which on it is less work to widen the weights than to multiply by them


@functools.cache
def multiplies_bf16() -> bool:
    """Whether PyTorch has more than a plain loop for bf16 on this processor. Without AVX-512 it has not, and products
    of many rows take 6 to 25 times as long as in fp32 (512 x 576 by 576 x 8192, one core of Zen 3: 569 and 93 ms)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def head_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(hidden (.., H), weight (V, H), bias (V,)), by oneDNN where that is faster, and bf16 by way of fp32 on a
    processor that has no products of bf16."""
    if weight.shape[0] < LEAST_OUTPUTS or torch.is_grad_enabled():
        return F.linear(hidden, weight, bias)
    if hidden.is_cuda:
        return gpu_products.linear(hidden.reshape(-1, hidden.shape[-1]), weight, bias).view(
            *hidden.shape[:-1], len(weight)
        )
    if fits_onednn(hidden, weight):
        return onednn_product(hidden.contiguous(), weight, bias)
    kinds = {hidden.dtype, weight.dtype} if bias is None else {hidden.dtype, weight.dtype, bias.dtype}
    many = hidden.numel() // max(hidden.shape[-1], 1) >= WIDENED_ROWS
    if many and kinds == {torch.bfloat16} and weight.is_cpu and is_plain(weight) and not multiplies_bf16():
        return _widened(hidden, weight, bias)
    return F.linear(hidden, weight, bias)


def _widened(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in fp32, rounded to bf16; some outputs at a time."""
    wide, out = hidden.float(), hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
    for start in range(0, len(weight), LEAST_OUTPUTS):
        part = slice(start, start + LEAST_OUTPUTS)
        out[..., part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out


def head_logits(head: nn.Module, last_hidden: Tensor) -> Tensor:
    """(.., H) -> (.., V) by a model's output embedding; anything but a plain nn.Linear computes for itself."""
    changed = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    if type(head) is not nn.Linear or changed or not is_plain(head.weight):
        return head(last_hidden)
    return head_linear(last_hidden, head.weight, head.bias)


def fits_onednn(*factors: Tensor) -> bool:
    """Whether these are the plain fp32 matrices on a CPU that `onednn_product` takes."""
    return torch.backends.mkldnn.is_available() and all(
        factor.dtype == torch.float32 and factor.device.type == "cpu" and factor.numel() > 0 and is_plain(factor)
        for factor in factors
    )


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (.., X) @ right (C, X).T + bias (C,), without gradient."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def is_plain(tensor: Tensor) -> bool:
    """Not one process's part of a tensor, nor any other kind with rules of its own."""
    return type(tensor.data) is Tensor
