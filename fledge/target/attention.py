"""Scaled dot-product attention of grouped heads, for the target while it decodes and for drafters.

Knows tensors alone. Few rows on a GPU take a kernel that splits the keys (`gpu.py`). A mask together with `enable_gqa`
has no fused kernel of PyTorch's there, which then repeats keys and values and keeps the scores. So the query heads that
share a key head become rows of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.target import gpu

# B sequences, h query heads, g key heads, S rows, K keys, d head_dim


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False,
    scale: float | None = None, packs_rows: bool = False,
) -> Tensor:  # fmt: skip
    """query (B, h, S, d), key and value (B, g, K, d), mask (.., S, K) -> (B, h, S, d). The numbers are the same however
    they are computed. `packs_rows`: pack on a CPU, too, where that is faster."""
    batch, heads, rows, head_dim = query.shape
    groups = heads // key.shape[1]
    if not causal and gpu.can_attend(query, key, value, mask):
        return gpu.attend(query, key, value, mask, head_dim**-0.5 if scale is None else scale).transpose(1, 2)
    if groups == 1 or causal or not (packs_rows or query.is_cuda):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    packed = query.reshape(batch, key.shape[1], groups * rows, head_dim)
    if mask is not None and rows > 1:
        mask = mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, rows, -1)


UNSEEN = -1e30  # a mask below is one that hides


def attention_by_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query (B, h, S, d), key (B, g, K, d), value (B, g, K, e), mask (B or 1, 1, S, K), sinks (h,) -> (B, S, h, e).
    Row by row, over the keys that it sees: its bits depend on nothing else."""
    batch, heads, rows, _ = query.shape
    groups, out = key.shape[1], query.new_empty(batch, rows, heads, value.shape[3])
    for b in range(batch):
        its_keys, its_values = key[b].float(), value[b].float()
        for row in range(rows):
            keys, values, shown = its_keys, its_values, None
            if mask is not None:
                shown = mask[min(b, len(mask) - 1), 0, row]
                seen = (shown > UNSEEN).nonzero()[:, 0]
                keys, values, shown = keys[:, seen], values[:, seen], shown[seen].float()
            asked = query[b, :, row].float().view(groups, heads // groups, 1, -1)
            scores = (asked * keys[:, None]).sum(-1) * scale  # (g, h / g, K)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if shown is not None:
                scores = scores + shown
            if sinks is not None:
                scores = torch.cat((scores, sinks.float().view(groups, -1, 1)), dim=-1)
            weights = scores.softmax(-1)[..., : keys.shape[1]]
            out[b, row] = (weights[..., None] * values[:, None]).sum(-2).flatten(0, 1).to(out.dtype)
    return out
