"""The head's rope against the rotary module of the target's own family."""

import pytest
import torch
from tiny_vlm import MULTIMODAL_ROPE, tiny_vlm
from torch import nn

from fledge.drafters.eagle3.config import derive
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.rope import LAYOUTS, axis_of_dims, with_layout
from fledge.errors import UserError
from fledge.target.model import Target


def draft_of(target: Target, **changes) -> DraftModel:
    config = derive(
        target.text_config, vocab_size=target.vocab_size, tap_layers=target.tap_layers, draft_vocab_size=None,
        overrides=changes,
    )  # fmt: skip
    return DraftModel(config, target.embedding_weight).eval()


def rotary_of(target: Target) -> nn.Module:
    """The module that makes cos and sin for the target's layers."""
    decoder = target.model.get_decoder()
    return next(module for name, module in decoder.named_modules() if name.endswith("rotary_emb"))


def positions(axes: int, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 300, (axes, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_cos_and_sin_are_the_targets(name):
    target = tiny_vlm(name)
    ids = positions(target.rope_axes)
    expected = rotary_of(target)(torch.zeros(1), ids[:, None])
    for found, wanted in zip(draft_of(target).rope(ids), expected, strict=True):
        torch.testing.assert_close(found, wanted[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_text_positions_may_be_one_row(name):
    target = tiny_vlm(name)
    draft, ids = draft_of(target), torch.arange(40)
    for one, many in zip(draft.rope(ids), draft.rope(ids.expand(target.rope_axes, -1)), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
@pytest.mark.parametrize("wrong", ["chunked", "interleaved", "across"])
def test_another_familys_layout_is_noticed(name, wrong):
    """The negative control: every layout but the target's own gives other numbers."""
    target = tiny_vlm(name)
    if LAYOUTS[target.text_config.model_type] == wrong:
        pytest.skip("its own")
    rope = dict(draft_of(target).config.rope_parameters)
    rope.pop("mrope_layout", None)
    rope["mrope_interleaved"] = wrong == "interleaved"
    if wrong == "across":
        rope["mrope_layout"] = wrong
    ids = positions(target.rope_axes)
    expected = rotary_of(target)(torch.zeros(1), ids[:, None])
    found = draft_of(target, rope_parameters=rope).rope(ids)
    assert (found[0] - expected[0][0]).abs().max() > 0.1


def test_layouts_as_drawn():
    sections = {"mrope_section": [2, 3, 3]}
    assert axis_of_dims(sections, 16) == [0, 0, 1, 1, 1, 2, 2, 2] * 2
    assert axis_of_dims({"mrope_section": [4, 2, 2], "mrope_interleaved": True}, 16) == [0, 1, 2, 0, 1, 2, 0, 0] * 2
    across = {"mrope_section": [2, 2, 2, 2], "mrope_layout": "across"}
    assert axis_of_dims(across, 16) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert axis_of_dims({}, 16) is None


def test_an_unknown_family_is_an_error_that_names_the_table():
    with pytest.raises(UserError, match=r"'brand_new' has a multimodal rope .*fledge/drafters/rope\.py"):
        with_layout({"mrope_section": [1, 1, 1]}, "brand_new")
    with pytest.raises(UserError, match="adds up to 6; half the rotary dimensions are 8"):
        axis_of_dims({"mrope_section": [2, 2, 2]}, 16)
