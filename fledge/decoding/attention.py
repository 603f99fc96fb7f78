"""The attention function stock models use while fledge decodes: scaled dot-product attention that never copies keys.

With a mask, transformers' own function repeats grouped keys and values to every query head, layer by layer: at 1000
rows that costs more than the attention itself. Exact all the same: the same kernel on the same numbers. Measured on two
CPU cores (9 query heads on 3, head_dim 64, 1000 keys, bf16 / fp32 microseconds per layer):

    rows   repeated      grouped kernel   heads packed into rows
    1      738 / 379     614 / 127        119 / 157
    6      398 / 592     264 / 299        265 / 331
    60     1951 / 2080   1808 / 1683      2071 / 2067
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.target.attention import grouped_sdpa

NAME = "fledge_sdpa"
UNUSUAL = ("position_bias", "softcap", "s_aux", "cache")  # what the stock function would have to look at


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, h, S, d), key, value (B, g, K, d) -> (B, S, h, d). No mask: causal, or one row that sees all."""
    if any(kwargs.get(name) is not None for name in UNUSUAL):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )  # fmt: skip
    rows = query.shape[2]
    output = grouped_sdpa(
        query, key, value, attention_mask, causal=attention_mask is None and rows > 1 and is_causal is not False,
        scale=scaling, packs_rows=rows == 1 and query.dtype != torch.float32,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)


def can_replace(model: Any, text_config: Any) -> bool:
    """Models that may use sdpa take our function; eager ones (attention sinks, soft-capped scores) keep their own."""
    return bool(getattr(model, "_supports_sdpa", False)) and text_config._attn_implementation != "eager"


@contextmanager
def stock_attention(text_config: Any) -> Iterator[None]:
    """Inside `decoding_attention`, the library's own function again: with it the model makes its own masks."""
    before = text_config._attn_implementation
    text_config._attn_implementation = "sdpa" if before == NAME else before
    try:
        yield
    finally:
        text_config._attn_implementation = before


@contextmanager
def decoding_attention(model: Any, text_config: Any) -> Iterator[None]:
    """Use `grouped_attention` inside the block, where the model allows it."""
    if not can_replace(model, text_config):
        yield
        return
    before = text_config._attn_implementation
    text_config._attn_implementation = NAME
    try:
        yield
    finally:
        text_config._attn_implementation = before
