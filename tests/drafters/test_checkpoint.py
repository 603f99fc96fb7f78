"""Heads as folders: what is saved is what is loaded, and a head that cannot work says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_draft, tiny_target

from fledge.drafters.eagle3.checkpoint import load_draft, save_draft
from fledge.errors import UserError

NAMES = {
    "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    *(f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    *(f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    save_draft(tiny_draft(tiny_target("llama")), folder, dtype=torch.float32)
    return folder


@pytest.fixture
def head(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "head"))


@pytest.mark.parametrize("eagle31", [False, True])
@pytest.mark.parametrize("draft_vocab_size", [48, None])
def test_what_is_saved_is_loaded(tmp_path, draft_vocab_size, eagle31):
    target = tiny_target("llama")
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size, eagle31=eagle31)
    save_draft(draft, tmp_path, dtype=torch.float32)
    found = load_draft(tmp_path, target.embedding_weight)
    assert found.config == draft.config
    assert found.state_dict().keys() == draft.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    taps = target.forward(torch.tensor([prompt(5)])).tap_hidden.clone()
    assert torch.equal(found.logits(found.fuse(taps)), draft.logits(draft.fuse(taps)))


def test_tensor_names_are_eagles(saved):
    assert set(load_file(saved / "model.safetensors")) == NAMES
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_whole_vocabulary_needs_no_maps_and_eagle31_has_its_norms(tmp_path):
    save_draft(tiny_draft(tiny_target("llama"), draft_vocab_size=None, eagle31=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == (NAMES - {"d2t", "t2d"}) | {f"fc_norm.{index}.weight" for index in range(3)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def drop_d2t(tensors):
    del tensors["d2t"]


def drop_fc(tensors):
    del tensors["fc.weight"]


def add_layer(tensors):
    tensors["layers.0.mlp.up_proj.weight"] = torch.zeros(2)


def poison(tensors):
    tensors["midlayer.mlp.up_proj.weight"][0, 0] = float("nan")


def shift_d2t(tensors):
    tensors["d2t"] += 1


def clear_t2d(tensors):
    tensors["t2d"][tensors["t2d"].nonzero()[0]] = False


def narrow_head(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:40].clone()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop_d2t, r"missing: d2t"),
        (drop_fc, r"missing: fc\.weight"),
        (add_layer, r"unknown: layers\.0\.mlp\.up_proj\.weight"),
        (poison, r"midlayer\.mlp\.up_proj\.weight contains NaN"),
        (shift_d2t, "d2t"),
        (clear_t2d, "t2d"),
        (narrow_head, r"lm_head\.weight has shape \(40, 64\), its config.json asks for \(48, 64\)"),
    ],
)
def test_a_bad_head_is_one_line_that_names_the_file(head, spoil, message):
    path = head / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        load_draft(head, tiny_target("llama").embedding_weight)
    assert str(head) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_is_a_user_error(head):
    path = head / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_draft(head, tiny_target("llama").embedding_weight)


def test_missing_files_are_user_errors(head, tmp_path):
    embedding = tiny_target("llama").embedding_weight
    with pytest.raises(UserError, match="no such folder"):
        load_draft(tmp_path / "nowhere", embedding)
    (head / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_draft(head, embedding)
    (head / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_draft(head, embedding)


@pytest.mark.parametrize("rows, size", [(127, 64), (128, 32)])
def test_a_head_of_another_target_is_refused(head, rows, size):
    with pytest.raises(UserError, match=f"vocabulary 128 and hidden size 64; this target has {rows} and {size}"):
        load_draft(head, torch.zeros(rows, size))


def test_weights_and_config_that_do_not_belong_together(head):
    document = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**document, "intermediate_size": 80}))
    with pytest.raises(UserError, match="config.json asks for"):
        load_draft(head, tiny_target("llama").embedding_weight)
