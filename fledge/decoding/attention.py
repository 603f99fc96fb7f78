"""The attention functions stock models use while fledge decodes.

With a mask, transformers' own function repeats grouped keys and values to every query head, layer by layer: at 1000
rows that costs more than the attention itself. Ours never copies keys. On a CPU a compiled loop (`native.attend`) does
it for few rows where that is faster, elsewhere PyTorch's kernels.

`exact_attention` gives a row the same bits alone, in a chain, in a tree and in a batch: sums are taken over the keys
that the row sees, in the order of the text, which is the order of the cache, also in a tree. The compiled loop does
that as it is, a GPU's kernel (`gpu_exact.py`) is told where a node's ancestors lie. `attention_by_rows` is the slow
twin of both, and does it on a CPU where there is no compiler or heads have odd sizes.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.target import gpu_exact, native
from fledge.target.attention import attention_by_rows, grouped_sdpa

NAME = "fledge_sdpa"
EXACT_NAME = "fledge_exact"
MOST_ROWS = 512  # of a text; with more, PyTorch's kernel, which leaves out what no row sees, is as fast
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
    rows, keys = query.shape[2], key.shape[2]
    causal = attention_mask is None and rows > 1 and is_causal is not False
    if query.is_cpu and rows <= MOST_ROWS and (rows == keys or not causal) and native.attention_is_faster():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = causal_mask(rows, query.dtype) if causal else attention_mask
        if (found := native.attend(query, key, value, seen, scale, most_rows=sys.maxsize)) is not None:
            return found, None
    output = grouped_sdpa(
        query, key, value, attention_mask, causal=causal,
        scale=scaling, packs_rows=rows == 1 and query.dtype != torch.float32,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


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
    """The same, but a row's bits do not depend on what is computed beside it. `paths` beside it: on a GPU."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (paths := kwargs.get("paths")) is not None:
        if any(kwargs.get(name) is not None for name in UNUSUAL):
            raise ValueError(f"there it knows nothing of {' and '.join(UNUSUAL)}")
        return gpu_exact.attend(query, key, value, attention_mask, paths, scale), None
    beside: dict[str, Any] = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    found = native.attend(query, key, value, attention_mask, scale, most_rows=sys.maxsize, **beside)
    return attention_by_rows(query, key, value, attention_mask, scale, **beside) if found is None else found, None


@functools.lru_cache(maxsize=4)
def causal_mask(rows: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, S, S), added to scores; on a CPU."""
    return torch.full((rows, rows), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


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
