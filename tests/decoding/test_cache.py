"""Rows written in place or at scattered places, read as views, and compacted."""

import torch
from tiny import tiny_target

from fledge.decoding.cache import Slab, TargetCache, layout_of

CPU = torch.device("cpu")
NARROW, WIDE = Slab(2, 2, torch.float32, CPU), Slab(3, 4, torch.float32, CPU)


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


def store(cache: TargetCache, values: list[list[int]]) -> list[list[int]]:
    """Write the same values into blocks of two shapes, as a model's layers would; what is read back."""
    found = [
        *cache.update(rows(values, 2, 2), rows(values, 3, 4), 0),
        *cache.update(rows(values, 2, 2), rows(values, 2, 2), 2),
    ]
    assert all(shown(states) == shown(found[0]) for states in found)
    return shown(found[0])


def two_slots() -> TargetCache:
    cache = TargetCache({0: (NARROW, WIDE), 2: (NARROW, NARROW)}, num_layers=3, batch=2, capacity=12)
    for slot, known in enumerate(([1, 2, 3], [4, 5, 6, 7, 8])):
        cache.open_block(slice(slot, slot + 1), 0, len(known))
        assert store(cache, [known]) == [known]
    return cache


def test_the_drawing():
    """Sequences of their own lengths, read as K rows, compacted to their own paths."""
    cache, lengths = two_slots(), torch.tensor([3, 5])
    cache.open_rows(lengths, 3, 8)
    assert store(cache, [[11, 12, 13], [21, 22, 23]]) == [[1, 2, 3, 11, 12, 13, 0, 0], [4, 5, 6, 7, 8, 21, 22, 23]]
    cache.compact(lengths, torch.tensor([[0, 2], [0, 0]]))
    cache.open_rows(lengths + torch.tensor([2, 1]), 1, 8)
    found = store(cache, [[14], [24]])
    assert found[0][:6] == [1, 2, 3, 11, 13, 14] and found[1][:7] == [4, 5, 6, 7, 8, 21, 24]


def test_the_first_slots_alone():
    """A batch that has shrunk writes, reads and compacts its own slots only; the last one may move into a free slot."""
    cache = two_slots()
    cache.open_rows(torch.tensor([3]), 2, 6)
    assert store(cache, [[11, 12]]) == [[1, 2, 3, 11, 12, 0]]
    cache.compact(torch.tensor([3]), torch.tensor([[1]]))
    cache.open_block(slice(0, 1), 4, 1)
    assert store(cache, [[13]]) == [[1, 2, 3, 12, 13]]
    cache.move(1, 0)
    cache.open_block(slice(0, 1), 5, 1)
    assert store(cache, [[9]]) == [[4, 5, 6, 7, 8, 9]]


def test_it_grows_and_says_its_size():
    cache = two_slots()
    before = cache.num_bytes
    cache.reserve(24)
    assert cache.num_bytes == 2 * before
    cache.open_block(slice(1, 2), 5, 1)
    assert store(cache, [[9]]) == [[4, 5, 6, 7, 8, 9]]
    cache.open_rows(torch.tensor([20, 21]), 1, 24)
    assert [row[-4:] for row in store(cache, [[30], [31]])] == [[30, 0, 0, 0], [0, 31, 0, 0]]


def test_reading_copies_nothing():
    cache = two_slots()
    cache.open_block(slice(0, 2), 0, 1)
    first, _ = cache.update(rows([[1], [2]], 2, 2), rows([[1], [2]], 3, 4), 0)
    cache.open_rows(torch.tensor([1, 1]), 1, 4)
    again, _ = cache.update(rows([[3], [4]], 2, 2), rows([[3], [4]], 3, 4), 0)
    assert again.data_ptr() == first.data_ptr()


def test_what_a_model_asks():
    cache = two_slots()
    cache.open_block(slice(0, 1), 3, 2)
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(2) == (5, 0)


def test_the_layout_is_the_models():
    """Latent attention keeps one latent "head" and its rotary part; no config field says so for every model."""
    layout = layout_of(tiny_target("deepseek_v3"))
    assert sorted(layout) == [0, 1, 2, 3]
    assert layout[0] == (Slab(1, 16, torch.float32, CPU), Slab(1, 8, torch.float32, CPU))
    assert layout_of(tiny_target("qwen3"))[3] == (Slab(2, 32, torch.float32, CPU),) * 2
