"""The attention function stock models use while fledge decodes: scaled dot-product attention that never copies keys.

With a mask, transformers' own function repeats grouped keys and values to every query head, layer by layer: at 1000
rows that costs more than the attention itself. Exact all the same: the same kernel on the same numbers. Measured on two
CPU cores (9 query heads on 3, head_dim 64, 1000 keys, bf16 / fp32 microseconds per layer):

    rows   repeated      grouped kernel   heads packed into rows
    1      738 / 379     614 / 127        119 / 157
    6      398 / 592     264 / 299        265 / 331
    60     1951 / 2080   1808 / 1683      2071 / 2067
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.decoding.row_attention import Cut, cut_attention
from fledge.target.attention import grouped_sdpa

NAME = "fledge_sdpa"
EXACT_NAME = "fledge_exact"
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


class CutMask(Tensor):
    """An attention mask that also says how the keys are cut for `cut_attention`."""

    cut: Cut

    @staticmethod
    def of(mask: Tensor, cut: Cut) -> "CutMask":
        marked = mask.as_subclass(CutMask)
        marked.cut = cut
        return marked


def with_cuts(masks: Any, cuts: Mapping[str, Cut]) -> Any:
    """What `Masks` built, one tensor or a dict by kind, with the cut of each kind."""
    if isinstance(masks, dict):
        return {kind: CutMask.of(mask, cuts[kind]) for kind, mask in masks.items()}
    return CutMask.of(masks, next(iter(cuts.values())))


def exact_attention(
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
    """The same, but a row's bits do not depend on what is computed beside it."""
    assert isinstance(attention_mask, CutMask), "a model that makes another mask of ours"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    return cut_attention(attention_mask.cut, query, key, value, scale=scale, softcap=softcap, sinks=sinks), None


AttentionInterface.register(NAME, grouped_attention)
AttentionInterface.register(EXACT_NAME, exact_attention)


def can_replace(model: Any, text_config: Any) -> bool:
    """Models that may use sdpa take our function; eager ones (attention sinks, soft-capped scores) keep their own."""
    return bool(getattr(model, "_supports_sdpa", False)) and text_config._attn_implementation != "eager"


def can_be_exact(model: Any) -> bool:
    """Models that ask transformers' attention interface, whatever they use by default."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def stock_attention(text_config: Any) -> Iterator[None]:
    """Inside `decoding_attention`, the library's own function again: with it the model makes its own masks."""
    before = text_config._attn_implementation
    with _implementation(text_config, "sdpa" if before == NAME else before):
        yield


@contextmanager
def decoding_attention(model: Any, text_config: Any) -> Iterator[None]:
    """Use `grouped_attention` inside the block, where the model allows it."""
    if not can_replace(model, text_config):
        yield
        return
    with _implementation(text_config, NAME):
        yield


@contextmanager
def row_attention(text_config: Any) -> Iterator[None]:
    """Use `exact_attention` inside the block."""
    with _implementation(text_config, EXACT_NAME):
        yield


@contextmanager
def _implementation(text_config: Any, name: str) -> Iterator[None]:
    before = text_config._attn_implementation
    text_config._attn_implementation = name
    try:
        yield
    finally:
        text_config._attn_implementation = before
