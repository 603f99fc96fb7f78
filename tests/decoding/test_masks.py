"""Masks against the drawing and against transformers' own causal masks."""

from types import SimpleNamespace

import pytest
import torch

from fledge.decoding.masks import FULL, Kind, Masks, kinds_of
from fledge.drafters.tree import Trees, ancestors_of, roots_only
from fledge.errors import UserError

PARENTS = torch.tensor([[0, 0, 0, 1]])
TREES = Trees(torch.arange(4)[None], PARENTS, torch.tensor([[0, 1, 1, 2]]), ancestors_of(PARENTS, 2))
LENGTHS = torch.tensor([3])


def masks(*kinds: Kind, causal_by_default: bool = True) -> Masks:
    return Masks(list(kinds), torch.float32, torch.device("cpu"), causal_by_default=causal_by_default)


def seen(mask: torch.Tensor) -> list[list[int]]:
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    return (mask[0, 0] == 0).int().tolist()


def test_the_drawing():
    sliding = Kind("sliding_attention", 3)
    both = masks(FULL, sliding).trees(LENGTHS, TREES, 7, whole=True)
    assert seen(both["full_attention"]) == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 0, 1],
    ]
    assert seen(both["sliding_attention"]) == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 1, 0],
        [0, 0, 0, 1, 1, 0, 1],
    ]


def test_chunks_cut_where_positions_do():
    mask = masks(Kind("chunked_attention", 4)).trees(LENGTHS, TREES, 7, whole=True)
    assert seen(mask) == [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1]]


def test_a_window_that_reaches_back_shares_the_full_mask():
    both = masks(FULL, Kind("sliding_attention", 7)).trees(LENGTHS, TREES, 7, whole=True)
    assert both["sliding_attention"] is both["full_attention"]


def test_one_row_needs_no_mask_until_the_window_is_full():
    roots, lengths = roots_only(torch.tensor([[9]])), torch.tensor([4])
    assert masks(Kind("sliding_attention", 5)).trees(lengths, roots, 5, whole=True) is None
    assert seen(masks(Kind("sliding_attention", 4)).trees(lengths, roots, 5, whole=True)) == [[0, 1, 1, 1, 1]]
    assert seen(masks(FULL).trees(lengths, roots, 6, whole=False)) == [[1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("window", [3, 20])
def test_prompt_masks_are_transformers(window):
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(sliding_window=window)
    config._attn_implementation = "eager"
    theirs = create_sliding_window_causal_mask(config, torch.zeros(1, 9, 8), None, None)
    ours = masks(Kind("sliding_attention", window), causal_by_default=False).causal(9)
    assert torch.equal(ours, theirs)
    assert (masks(Kind("sliding_attention", window)).causal(9) is None) == (window == 20)


def test_kinds_come_from_the_config():
    assert kinds_of(SimpleNamespace(), "t") == [FULL]
    assert kinds_of(SimpleNamespace(sliding_window=9), "t") == [Kind("sliding_attention", 9)]
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=9)
    assert kinds_of(mixed, "t") == [FULL, Kind("sliding_attention", 9)]
    with pytest.raises(UserError, match="t: layers of type 'linear_attention' keep a running state"):
        kinds_of(SimpleNamespace(layer_types=["linear_attention", "full_attention"]), "t")


@pytest.mark.parametrize("kind", [FULL, Kind("sliding_attention", 3), Kind("chunked_attention", 4)])
def test_trees_of_a_batch_are_each_alone(kind):
    """Behind prefixes of 3 and 6 rows, over 12 keys: the same rows as alone, and nothing behind the tree."""
    lengths, parents = torch.tensor([3, 6]), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2]])
    levels = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3]])
    batch = Trees(torch.zeros_like(parents), parents, levels, ancestors_of(parents, 3))
    found = masks(kind).trees(lengths, batch, 12, whole=False)
    for row, length in enumerate(lengths.tolist()):
        names = ("token_ids", "parents", "levels", "ancestors")
        one = Trees(*(getattr(batch, name)[row : row + 1] for name in names))
        alone = masks(kind).trees(lengths[row : row + 1], one, length + 4, whole=True)
        assert seen(found[row : row + 1]) == [[*line, *[0] * (8 - length)] for line in seen(alone)]
    assert found.shape == (2, 1, 4, 12)


def test_trees_share_the_full_mask_within_the_window():
    roots = roots_only(torch.tensor([[9]]))
    wide = masks(FULL, Kind("sliding_attention", 16)).trees(LENGTHS, roots, 16, whole=False)
    assert wide["sliding_attention"] is wide["full_attention"]
    narrow = masks(FULL, Kind("sliding_attention", 15)).trees(LENGTHS, roots, 16, whole=False)
    assert narrow["sliding_attention"] is not narrow["full_attention"]
