"""Layouts: round trips are the identity, every tap convention lands on the same layers, unknown keys are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_target

from fledge.draft.checkpoint import WEIGHTS, draft_tensors, save_draft
from fledge.errors import UserError
from fledge.export.convert import ConvertArgs, ExportArgs, convert_head, expected_shapes, export_head, read_head
from fledge.export.layouts import LAYOUTS

CONVENTION = {"eagle": "input", "vllm": "input", "sglang": "output", "speculators": "input"}


@pytest.fixture(params=[False, True], ids=["eagle3", "eagle3.1"])
def head_dir(request, tmp_path):
    save_draft(tiny_draft(tiny_target("qwen3"), eagle31=request.param), tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_the_identity(head_dir, tmp_path, layout):
    export_head(ExportArgs(head=str(head_dir), to=layout, output_dir=tmp_path / "out", target="T"))
    convert_head(ConvertArgs(
        head=str(tmp_path / "out"), output_dir=tmp_path / "back", tap_convention=CONVENTION[layout]))  # fmt: skip
    before, after = read_head(head_dir), read_head(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    for field in ("tap_layers", "rope_parameters", "head_dim", "fc_norm", "norm_output", "draft_vocab_size"):
        assert getattr(before.config, field) == getattr(after.config, field), field


def test_the_wrong_tap_convention_is_another_head(head_dir, tmp_path):
    """Negative control: SGLang's ids read as inputs are off by one."""
    export_head(ExportArgs(head=str(head_dir), to="sglang", output_dir=tmp_path / "out"))
    convert_head(ConvertArgs(head=str(tmp_path / "out"), output_dir=tmp_path / "back", tap_convention="input"))
    assert read_head(tmp_path / "back").config.tap_layers != read_head(head_dir).config.tap_layers


def test_speculators_names_and_fields(head_dir, tmp_path):
    export_head(ExportArgs(head=str(head_dir), to="speculators", output_dir=tmp_path / "out", target="T"))
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert "layers.0.hidden_norm.weight" in names and not any(name.startswith("midlayer") for name in names)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model_type" not in document and document["transformer_layer_config"]["model_type"] == "llama"
    assert document["norm_before_residual"] is False
    assert document["speculators_config"]["verifier"]["name_or_path"] == "T"
    with pytest.raises(UserError, match="--target is needed"):
        export_head(ExportArgs(head=str(head_dir), to="speculators", output_dir=tmp_path / "x"))


def test_expected_shapes_are_the_models():
    draft = tiny_draft(tiny_target("qwen3"), eagle31=True)
    assert expected_shapes(draft.config) == {k: tuple(v.shape) for k, v in draft_tensors(draft, torch.float32).items()}


def test_angelslim_and_eagle_heads(head_dir, tmp_path):
    """AngelSlim's architecture name, an embedding in the file, no tap ids, an old pytorch_model.bin."""
    tensors = load_file(head_dir / WEIGHTS)
    document = json.loads((head_dir / "config.json").read_text())
    for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config", "fledge", "rope_parameters"):
        document.pop(key)
    document["architectures"] = ["Eagle3LlamaForCausalLM"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps(document))
    torch.save({**tensors, "embed_tokens.weight": torch.zeros(128, 64)}, foreign / "pytorch_model.bin")
    with pytest.raises(UserError, match="names no tap layers. Give --target"):
        convert_head(ConvertArgs(head=str(foreign), output_dir=tmp_path / "back"))
    tiny_target("llama").model.config.save_pretrained(tmp_path / "target")
    where = {"head": str(foreign), "output_dir": tmp_path / "back", "target": str(tmp_path / "target")}
    convert_head(ConvertArgs(**where, rope_theta=123.0))
    back = read_head(tmp_path / "back")
    assert back.config.tap_layers == (2, 4, 5) and back.config.rope_parameters["rope_theta"] == 123.0
    assert all(torch.equal(back.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("how", ["missing", "unknown", "residual"])
def test_what_cannot_be_converted_is_named(head_dir, tmp_path, how):
    tensors = load_file(head_dir / WEIGHTS)
    document = json.loads((head_dir / "config.json").read_text())
    if how == "missing":
        del tensors["norm.weight"]
    if how == "unknown":
        tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(32)
    if how == "residual":
        document["norm_before_residual"] = True
    (head_dir / "config.json").write_text(json.dumps(document))
    save_file(tensors, head_dir / WEIGHTS)
    message = {"missing": "missing: norm.weight", "unknown": "unknown: midlayer.self_attn", "residual": "un-normed"}
    with pytest.raises(UserError, match=message[how]):
        convert_head(ConvertArgs(head=str(head_dir), output_dir=tmp_path / "back"))
