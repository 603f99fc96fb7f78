"""Attention of few rows: the compiled loop and its slow twin are softmax attention, and a row's bits are its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.decoding.masks import additive
from fledge.target import native
from fledge.target.attention import attention_by_rows

needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)
# batch, query heads, key heads, rows, keys, head size, value size
SIZES = (
    (1, 9, 3, 1, 21, 64, 64), (1, 4, 4, 5, 40, 16, 32), (3, 8, 2, 3, 33, 128, 128), (2, 6, 2, 4, 17, 64, 64),
    (2, 16, 2, 1, 48, 32, 32), (1, 2, 1, 2, 5, 256, 16),
)  # fmt: skip
CALLS = [
    pytest.param(native.attend, id="compiled", marks=needs_compiler),
    pytest.param(attention_by_rows, id="by rows"),
]


def tensors(sizes: tuple[int, ...], dtype: torch.dtype, *, spare: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as a cache hands them out: not contiguous, rubbish behind."""
    batch, heads, groups, rows, keys, size, value_size = sizes
    torch.manual_seed(1)
    caches = [torch.randn(batch, groups, keys + spare, width).to(dtype)[:, :, :keys] for width in (size, value_size)]
    return torch.randn(batch, rows, heads, size).to(dtype).transpose(1, 2), *caches


def trees(batch: int, rows: int, keys: int, dtype: torch.dtype) -> Tensor:
    """A mask of prefixes of unequal lengths, and behind them what each row sees at random; itself always."""
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(batch, rows, keys, generator=generator) < 0.6
    for b in range(batch):
        seen[b, :, : max(keys - rows - 2 * b, 0)] = True
    seen[..., -rows:] |= torch.eye(rows, dtype=torch.bool)
    return additive(seen, dtype)


def softmax_attention(query, key, value, mask, scale, *, softcap=None, sinks=None) -> Tensor:
    """As it is defined, in float64."""
    heads, groups = query.shape[1], key.shape[1]
    key, value = (one.double().repeat_interleave(heads // groups, dim=1) for one in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


@pytest.mark.parametrize("beside", [{}, {"softcap": 2.0}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@torch.inference_mode()
def test_it_is_attention(call, sizes, dtype, masked, beside):
    query, key, value = tensors(sizes, dtype)
    mask = trees(sizes[0], sizes[3], sizes[4], dtype) if masked else None
    if "sinks" in beside:
        beside = {"sinks": torch.randn(sizes[1]).to(dtype)}
    expected = softmax_attention(query, key, value, mask, 0.3, **beside)
    found = call(query, key, value, mask, 0.3, **beside)
    assert found.dtype is dtype and found.is_contiguous()
    error = (found.double() - expected).abs().max()
    assert error <= (2e-6 if dtype is torch.float32 else 1e-2) * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(call, dtype):
    """Alone behind its own text; as a node of a tree whose siblings lie between, in a batch with a longer text."""
    groups, heads, size, length = 3, 9, 64, 37
    torch.manual_seed(3)
    text = [torch.randn(1, groups, length + 3, size).to(dtype) for _ in range(2)]
    queries = torch.randn(1, heads, 3, size).to(dtype)
    alone = [
        call(queries[:, :, node : node + 1], *(one[:, :, : length + node + 1] for one in text), None, 0.125)
        for node in range(3)
    ]
    # the path's nodes are 0, 2 and 5 of six; the text stands in row 1 of a batch, behind it lies something
    path, capacity = [0, 2, 5], length + 20
    caches = [torch.randn(2, groups, capacity, size).to(dtype) for _ in range(2)]
    for cache, states in zip(caches, text, strict=True):
        cache[1, :, :length] = states[0, :, :length]
        cache[1, :, [length + node for node in path]] = states[0, :, length:]
    seen = torch.zeros(2, 6, capacity, dtype=torch.bool)
    seen[0, :, : length + 9] = True
    seen[1, :, :length] = True
    for depth, node in enumerate(path):
        seen[1, node, [length + one for one in path[: depth + 1]]] = True
    for node in (1, 3, 4):
        seen[1, node, length + node] = True
    asked = torch.randn(2, heads, 6, size).to(dtype)
    asked[1, :, path] = queries[0]
    found = call(asked, *caches, additive(seen, dtype), 0.125)
    for depth, node in enumerate(path):
        assert torch.equal(found[1, node], alone[depth][0, 0])
    if dtype != torch.float32:  # bf16 hides it on a processor without AVX-512
        return
    # PyTorch's kernel, the negative control, has other bits somewhere
    stock = F.scaled_dot_product_attention(
        asked, *caches, attn_mask=additive(seen, dtype), scale=0.125, enable_gqa=True
    )
    single = F.scaled_dot_product_attention(
        queries[:, :, 2:], *(one[:, :, : length + 3] for one in text), scale=0.125, enable_gqa=True
    )
    assert not torch.equal(stock[1, :, path[2]], single[0, :, 0])


@needs_compiler
@torch.inference_mode()
def test_threads_change_no_bit(monkeypatch):
    sizes = (2, 8, 2, 4, 200, 64, 64)
    query, key, value = tensors(sizes, torch.bfloat16)
    mask = trees(2, 4, 200, torch.bfloat16)
    one_by_one = native.attend(query, key, value, mask, 0.125)
    monkeypatch.setattr(native, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(native.attend(query, key, value, mask, 0.125), one_by_one)


@needs_compiler
@torch.inference_mode()
def test_what_is_left_to_pytorch():
    def attends(sizes=SIZES[0], dtype=torch.float32, mask=None, change=lambda query, key, value: (query, key, value)):
        return native.attend(*change(*tensors(sizes, dtype)), mask, 0.3) is not None

    assert attends()
    assert not attends((1, 2, 2, 1, 9, 24, 16)) and not attends((1, 2, 2, 1, 9, 16, 272))  # sizes of heads
    assert not attends((1, 2, 2, native.MOST_ROWS + 1, 99, 16, 16))
    assert not attends(dtype=torch.float16)
    assert not attends(change=lambda query, key, value: (query, key, value.bfloat16()))
    assert not attends(
        change=lambda query, key, value: (query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
    )
    assert not attends(mask=torch.zeros(1, 1, 1, 20)) and not attends(mask=torch.zeros(1, 1, 1, 21, dtype=torch.bool))
    with torch.inference_mode(False):
        assert not attends()  # gradients are on
