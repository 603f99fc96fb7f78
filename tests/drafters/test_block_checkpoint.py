"""Block drafts as folders: what is written is read again, and what cannot be read is one line."""

import json
from typing import Any

import pytest
import torch
from block_reference import tiny_block
from safetensors.torch import load_file, save_file
from tiny import tiny_target

from fledge.drafters.dspark.checkpoint import expected_shapes
from fledge.drafters.dspark.config import spread_tap_layers
from fledge.drafters.head_files import WEIGHTS, draft_tensors, save_draft
from fledge.drafters.registry import read_drafter
from fledge.errors import UserError

KINDS = [("dflash", {}), ("dspark", {}), ("dspark", {"sample_from_anchor": False, "causal": True, "sliding_window": 9})]


@pytest.mark.parametrize("draft_vocab_size", [48, None])
@pytest.mark.parametrize("draft_type, overrides", KINDS)
def test_a_folder_is_read_as_it_was_written(draft_type, overrides, draft_vocab_size, tmp_path):
    target = tiny_target("qwen3")
    draft = tiny_block(target, draft_type, draft_vocab_size=draft_vocab_size, **overrides)
    save_draft(draft, tmp_path / "head", dtype=torch.float32)
    files = read_drafter(tmp_path / "head")
    again: Any = files.bind(target)
    assert files.tap_layers == again.tap_layers == target.tap_layers and again.config == draft.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in draft.state_dict().items())
    assert ("lm_head.weight" in draft_tensors(draft, torch.float32)) == (draft_vocab_size is not None)


def test_expected_shapes_are_the_files(tmp_path):
    for draft_vocab_size in (48, None):
        draft = tiny_block(tiny_target("llama"), "dspark", draft_vocab_size=draft_vocab_size)
        found = {name: tuple(tensor.shape) for name, tensor in draft_tensors(draft, torch.float32).items()}
        assert expected_shapes(draft.config) == found


def test_the_block_layout_is_always_written(tmp_path):
    """Absent, it means one thing in one layout and the opposite in another, and the draft is served one token off."""
    for draft_type, from_anchor in (("dflash", False), ("dspark", True)):
        document = tiny_block(tiny_target("llama"), draft_type).document("bfloat16")
        assert document["sample_from_anchor"] is document["dflash_config"]["sample_from_anchor"] is from_anchor


def test_taps_are_written_as_outputs_of_layers():
    target = tiny_target("llama")
    document = tiny_block(target, "dflash").document("bfloat16")
    assert document["target_layer_ids"] == [layer - 1 for layer in target.tap_layers]
    assert [layer - 1 for layer in spread_tap_layers(36, 5)] == [1, 9, 17, 25, 33]
    assert spread_tap_layers(4, 5) == (2,) and spread_tap_layers(36, 1) == (19,)


CHANGES = [
    ({"sample_from_anchor": None, "dflash_config": None}, "sample_from_anchor missing.*fledge convert"),
    ({"target_layer_ids": None, "dflash_config": None}, "target_layer_ids missing"),
    ({"block_size": 0}, "Expected `int` >= 1"),
    (
        {"mask_token_id": 128, "dflash_config": None},
        r"mask_token_id=128 is no row of the target's.*0..127",
    ),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "one kind of attention in all layers"),
    ({"markov_head_type": "gated"}, "markov_head_type='gated'; fledge has the vanilla one"),
    ({"confidence_head_with_markov": False}, "confidence_head_with_markov=False beside markov_rank=64"),
    ({"num_hidden_layers": 3}, "missing: layers.2"),
    ({"markov_rank": 32}, r"markov_w1.weight has shape \(128, 64\), its config.json asks for \(128, 32\)"),
    ({"vocab_size": 100, "mask_token_id": 5}, "vocabulary|shape"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_a_damaged_config_is_one_line(change, message, tmp_path):
    save_draft(tiny_block(tiny_target("llama"), "dspark"), tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_drafter(tmp_path / "head")


def test_damaged_weights_are_one_line(tmp_path):
    save_draft(tiny_block(tiny_target("llama"), "dspark"), tmp_path / "head")
    path = tmp_path / "head" / WEIGHTS
    tensors = load_file(path)
    for name, tensor, message in (
        ("fc.weight", tensors["fc.weight"] * float("nan"), "fc.weight contains NaN"),
        ("mask_hidden", torch.zeros(4), "not the tensors of a block draft .unknown: mask_hidden"),
        ("d2t", tensors["d2t"].flip(0), "d2t"),
    ):
        save_file({**tensors, name: tensor}, path)
        with pytest.raises(UserError, match=message):
            read_drafter(tmp_path / "head")


def test_another_target_is_refused(tmp_path):
    save_draft(tiny_block(tiny_target("llama"), "dflash"), tmp_path / "head")
    files = read_drafter(tmp_path / "head")
    files.bind(tiny_target("qwen3"))  # the same sizes

    class Other:
        embedding_weight = torch.zeros(200, 64)

    with pytest.raises(UserError, match="vocabulary 128 and hidden size 64; this target has 200 and 64"):
        files.bind(Other())  # type: ignore[arg-type]
