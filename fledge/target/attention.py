"""Scaled dot-product attention of grouped heads, for the target while it decodes and for drafters.

Knows tensors alone. A mask together with `enable_gqa` has no fused kernel on a GPU, which then repeats keys and values
and keeps the scores. So there the query heads that share a key head become rows of one head.
"""

import torch.nn.functional as F
from torch import Tensor

# B sequences, h query heads, g key heads, S rows, K keys, d head_dim


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False,
    scale: float | None = None, packs_rows: bool = False,
) -> Tensor:  # fmt: skip
    """query (B, h, S, d), key and value (B, g, K, d), mask (.., S, K) -> (B, h, S, d). The numbers are the same however
    they are computed. `packs_rows`: pack on a CPU, too, where that is faster."""
    batch, heads, rows, head_dim = query.shape
    groups = heads // key.shape[1]
    if groups == 1 or causal or not (packs_rows or query.is_cuda):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    packed = query.reshape(batch, key.shape[1], groups * rows, head_dim)
    if mask is not None and rows > 1:
        mask = mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, rows, -1)
