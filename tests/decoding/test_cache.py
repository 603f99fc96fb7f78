"""Rows written in place, read as views, and compacted."""

import torch
from tiny import tiny_target

from fledge.decoding.cache import DraftCache, Slab, TargetCache, layout_of

CPU = torch.device("cpu")


def rows(values: list[int], heads: int = 1, dim: int = 2) -> torch.Tensor:
    """(1, heads, S, dim), every entry of row s is values[s]."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None].expand(1, heads, -1, dim)


def shown(states: torch.Tensor) -> list[int]:
    assert (states == states[:, :1, :, :1]).all()
    return states[0, 0, :, 0].int().tolist()


def test_the_drawing():
    """keep([0, 2, 3]) moves rows length, length + 2 and length + 3 together, in blocks of every shape."""
    narrow, wide = Slab(1, 2, torch.float32, CPU), Slab(3, 4, torch.float32, CPU)
    cache = TargetCache({0: (narrow, wide), 2: (narrow, narrow)}, num_layers=3, capacity=12)

    def store(values: list[int]) -> list[list[int]]:
        cache.open(len(values))
        zero = cache.update(rows(values), rows([-v for v in values], 3, 4), 0)
        two = cache.update(rows([v + 100 for v in values]), rows([v + 200 for v in values]), 2)
        return [shown(states) for states in (*zero, *two)]

    store([1, 2, 3])
    cache.keep([0, 1, 2])
    assert store([10, 11, 12, 13])[0] == [1, 2, 3, 10, 11, 12, 13]
    cache.keep([0, 2, 3])
    assert cache.get_seq_length() == 6 and cache.get_mask_sizes(4) == (10, 0)
    keys, values, keys_2, values_2 = store([20])
    assert keys == [1, 2, 3, 10, 12, 13, 20] and values == [-v for v in keys]
    assert keys_2 == [v + 100 for v in keys] and values_2 == [v + 200 for v in keys]


def test_reading_copies_nothing():
    slab = Slab(1, 2, torch.float32, CPU)
    cache = TargetCache({0: (slab, slab)}, num_layers=1, capacity=4)
    cache.open(1)
    keys, _ = cache.update(rows([1]), rows([1]), 0)
    cache.keep([0])
    cache.open(1)
    more, _ = cache.update(rows([2]), rows([2]), 0)
    assert more.data_ptr() == keys.data_ptr()


def test_the_layout_is_the_models():
    """Latent attention keeps one latent "head" and its rotary part; no config field says so for every model."""
    layout = layout_of(tiny_target("deepseek_v3"))
    assert sorted(layout) == [0, 1, 2, 3]
    assert layout[0] == (Slab(1, 16, torch.float32, CPU), Slab(1, 8, torch.float32, CPU))
    assert layout_of(tiny_target("qwen3"))[3] == (Slab(2, 32, torch.float32, CPU),) * 2


def test_a_draft_cache_forgets_the_tree():
    cache = DraftCache(1, 2, 8, torch.float32, CPU)
    cache.update(rows([1, 2]), rows([1, 2]))
    cache.commit()
    assert shown(cache.update(rows([7, 8]), rows([7, 8]))[0]) == [1, 2, 7, 8]
    cache.rewind()
    assert shown(cache.update(rows([3]), rows([3]))[1]) == [1, 2, 3]
