"""Layouts: round trips are the identity, every tap convention lands on the same layers, unknown keys are named."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_target

from fledge.drafters.eagle3.checkpoint import WEIGHTS, draft_tensors, save_draft
from fledge.drafters.eagle3.config import from_json, to_json
from fledge.drafters.eagle3.head import Head, expected_shapes, read_head
from fledge.errors import UserError
from fledge.export.convert import convert_head, export_head
from fledge.export.layouts import LAYOUTS
from fledge.export.settings import ConvertSettings, ExportSettings


@pytest.fixture(params=[False, True], ids=["eagle3", "eagle3.1"])
def head_dir(request, tmp_path):
    save_draft(tiny_draft(tiny_target("qwen3"), eagle31=request.param), tmp_path / "head")
    return tmp_path / "head"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_the_identity(head_dir, tmp_path, layout):
    """Our own exports say what their ids mean, so nothing has to be told on the way back."""
    if from_json(head_dir / "config.json").fc_norm and "fc_norm" in LAYOUTS[layout].ignores:
        pytest.skip("its reader has no norms of taps")
    export_head(ExportSettings(head=str(head_dir), to=layout, output_dir=tmp_path / "out", target="T"))
    convert_head(ConvertSettings(head=str(tmp_path / "out"), output_dir=tmp_path / "back"))
    before, after = read_head(head_dir), read_head(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    for field in ("tap_layers", "rope_parameters", "head_dim", "fc_norm", "norm_output", "draft_vocab_size"):
        assert getattr(before.config, field) == getattr(after.config, field), field


def test_the_wrong_tap_convention_is_another_head(head_dir, tmp_path):
    """Negative control: SGLang's ids read as inputs are off by one."""
    export_head(ExportSettings(head=str(head_dir), to="sglang", output_dir=tmp_path / "out"))
    convert_head(ConvertSettings(head=str(tmp_path / "out"), output_dir=tmp_path / "back", tap_convention="input"))
    assert read_head(tmp_path / "back").config.tap_layers != read_head(head_dir).config.tap_layers


def test_our_export_for_sglang_still_decodes_here(head_dir, tmp_path):
    """It once loaded with every tap one layer early: its ids are outputs, and its mark says so."""
    export_head(ExportSettings(head=str(head_dir), to="sglang", output_dir=tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    taps = from_json(head_dir / "config.json").tap_layers
    assert document["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [layer - 1 for layer in taps]
    assert from_json(tmp_path / "out" / "config.json").tap_layers == taps


def test_speculators_names_and_fields(head_dir, tmp_path):
    export_head(ExportSettings(head=str(head_dir), to="speculators", output_dir=tmp_path / "out", target="T"))
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert "layers.0.hidden_norm.weight" in names and not any(name.startswith("midlayer") for name in names)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model_type" not in document and document["transformer_layer_config"]["model_type"] == "llama"
    assert document["norm_before_residual"] is False
    assert document["speculators_config"]["verifier"]["name_or_path"] == "T"
    with pytest.raises(UserError, match="--target is needed"):
        export_head(ExportSettings(head=str(head_dir), to="speculators", output_dir=tmp_path / "x"))


def test_a_head_sglang_would_run_differently_is_not_written_for_it(head_dir, tmp_path):
    config = dataclasses.replace(from_json(head_dir / "config.json"), norm_before_residual=True)
    (head_dir / "config.json").write_text(json.dumps(to_json(config)))
    for layout in ("vllm", "speculators"):
        export_head(ExportSettings(head=str(head_dir), to=layout, output_dir=tmp_path / layout, target="T"))
        convert_head(ConvertSettings(head=str(tmp_path / layout), output_dir=tmp_path / "back"))
        assert from_json(tmp_path / "back" / "config.json").norm_before_residual
    with pytest.raises(UserError, match="norm_before_residual, which the reader of the sglang layout ignores"):
        export_head(ExportSettings(head=str(head_dir), to="sglang", output_dir=tmp_path / "sglang"))


def test_sglang_is_told_a_window_by_its_flag(head_dir, tmp_path, capsys):
    """Heads with a sliding window were refused for SGLang, which reads it from its command line only; that flag counts
    the keys before the query's own."""
    config = dataclasses.replace(from_json(head_dir / "config.json"), sliding_window=512)
    (head_dir / "config.json").write_text(json.dumps(to_json(config)))
    export_head(ExportSettings(head=str(head_dir), to="sglang", output_dir=tmp_path / "out"))
    flag = "--speculative-draft-window-size 511"
    assert flag in "".join(capsys.readouterr()) and flag in (tmp_path / "out" / "README.md").read_text()
    convert_head(ConvertSettings(head=str(tmp_path / "out"), output_dir=tmp_path / "back"))
    assert from_json(tmp_path / "back" / "config.json").sliding_window == 512
    plain = dataclasses.replace(config, sliding_window=None)
    assert LAYOUTS["sglang"].command(plain) == LAYOUTS["sglang"].serve
    assert LAYOUTS["vllm"].command(config) == LAYOUTS["vllm"].serve  # vLLM reads config.json


LOST_IN_LLAMA_CPP = {
    "fc_norm, norm_output": {"fc_norm": True, "norm_output": True},
    "sliding_window": {"sliding_window": 512},
    "4 taps": {"tap_layers": (1, 2, 4, 5)},
    "a 'yarn' rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                          "original_max_position_embeddings": 64}},
    "a partial_rotary_factor of 0.5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "partial_rotary_factor": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST_IN_LLAMA_CPP)
def test_what_llama_cpp_would_pass_over_is_not_written_for_it(lost):
    config = tiny_draft(tiny_target("llama")).config
    LAYOUTS["llama.cpp"].refuse(Head(config, {}))  # negative control
    with pytest.raises(UserError, match=f"has .*{lost}.* layout ignores"):
        LAYOUTS["llama.cpp"].refuse(Head(dataclasses.replace(config, **LOST_IN_LLAMA_CPP[lost]), {}))


def test_expected_shapes_are_the_models():
    draft = tiny_draft(tiny_target("qwen3"), eagle31=True)
    assert expected_shapes(draft.config) == {k: tuple(v.shape) for k, v in draft_tensors(draft, torch.float32).items()}


@pytest.mark.parametrize("how", ["missing", "unknown"])
def test_what_cannot_be_converted_is_named(head_dir, tmp_path, how):
    tensors = load_file(head_dir / WEIGHTS)
    if how == "missing":
        del tensors["norm.weight"]
    if how == "unknown":
        tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(32)
    save_file(tensors, head_dir / WEIGHTS)
    message = {"missing": "missing: norm.weight", "unknown": "unknown: midlayer.self_attn"}
    with pytest.raises(UserError, match=message[how]):
        convert_head(ConvertSettings(head=str(head_dir), output_dir=tmp_path / "back"))


def test_a_rope_base_can_be_told(head_dir, tmp_path):
    convert_head(ConvertSettings(head=str(head_dir), output_dir=tmp_path / "back", rope_theta=123.0))
    assert read_head(tmp_path / "back").config.rope_parameters["rope_theta"] == 123.0
