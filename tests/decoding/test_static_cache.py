"""Rows written at lengths that only tensors know, read as whole buckets, compacted per sequence."""

import torch

from fledge.decoding.cache import Slab
from fledge.decoding.static_cache import BatchCache, BatchDraftCache

CPU = torch.device("cpu")


def rows(values: list[list[int]], heads: int, dim: int) -> torch.Tensor:
    """(B, heads, S, dim): value + head / 10, in every dimension."""
    states = torch.tensor(values, dtype=torch.float32)[:, None, :, None]
    return states + torch.arange(heads)[None, :, None, None] / 10 + torch.zeros(1, 1, 1, dim)


def shown(states: torch.Tensor) -> list[list[int]]:
    assert (states[..., :1] == states).all(), "dimensions of a row were torn apart"
    heads = torch.arange(states.shape[1])[None, :, None] / 10
    values = states[..., 0]
    assert torch.allclose(torch.where(values == 0, 0, values - heads), values[:, :1].expand_as(values).round()), "heads"
    return values[:, 0].int().tolist()


def test_the_drawing():
    """Blocks of two shapes: a narrow one of two layers, a wide one for the first layer's values."""
    narrow, wide = Slab(2, 2, torch.float32, CPU), Slab(3, 4, torch.float32, CPU)
    cache = BatchCache({0: (narrow, wide), 1: (narrow, narrow)}, num_layers=2, batch=2, capacity=12)

    def store(values: list[list[int]]) -> list[list[list[int]]]:
        zero = cache.update(rows(values, 2, 2), rows(values, 3, 4), 0)
        one = cache.update(rows(values, 2, 2), rows(values, 2, 2), 1)
        return [shown(states) for states in (*zero, *one)]

    for sequence, prompt in enumerate(([1, 2, 3], [4, 5, 6, 7, 8])):
        cache.open_sequence(sequence, len(prompt))
        assert store([prompt]) == [[prompt]] * 4
    lengths = torch.tensor([3, 5])
    cache.open_behind(lengths, 3, bucket=8)
    assert store([[11, 12, 13], [21, 22, 23]]) == [[[1, 2, 3, 11, 12, 13, 0, 0], [4, 5, 6, 7, 8, 21, 22, 23]]] * 4
    cache.compact(lengths, torch.tensor([[0, 2], [0, 0]]))
    cache.open_behind(lengths + torch.tensor([2, 1]), 1, bucket=8)
    found = store([[14], [24]])
    assert [rows[0][:6] for rows in found] == [[1, 2, 3, 11, 13, 14]] * 4
    assert [rows[1][:7] for rows in found] == [[4, 5, 6, 7, 8, 21, 24]] * 4


def test_reading_copies_nothing():
    slab = Slab(1, 2, torch.float32, CPU)
    cache = BatchCache({0: (slab, slab)}, num_layers=1, batch=2, capacity=4)
    cache.open_behind(torch.tensor([0, 0]), 1, bucket=2)
    first, _ = cache.update(rows([[1], [2]], 1, 2), rows([[1], [2]], 1, 2), 0)
    cache.open_behind(torch.tensor([1, 1]), 1, bucket=4)
    again, _ = cache.update(rows([[3], [4]], 1, 2), rows([[3], [4]], 1, 2), 0)
    assert again.data_ptr() == first.data_ptr() and shown(first) == [[1, 3], [2, 4]]


def test_the_draft_cache():
    cache = BatchDraftCache(2, 3, 4, 6, torch.float32, CPU)
    for sequence, prompt in enumerate(([1, 2, 3], [4])):
        states = rows([prompt], 3, 4)[0].transpose(0, 1)
        cache.fill(sequence, states, states)
    cache.open(torch.tensor([[3, 4], [1, 2]]), bucket=5)
    for states in cache.update(rows([[5, 6], [7, 8]], 3, 4), rows([[5, 6], [7, 8]], 3, 4)):
        assert shown(states) == [[1, 2, 3, 5, 6], [4, 7, 8, 0, 0]]
