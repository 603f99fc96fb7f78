"""What vLLM's sources read of a block draft is what our export states, field by field and tensor by tensor.

No DSpark server is run anywhere in the tests: it needs vLLM's newer runner, which needs a GPU.
"""

import json
from pathlib import Path

import pytest
import torch
from block_reference import tiny_block
from engine_fields import fields_read
from safetensors.torch import load_file
from tiny import tiny_target

from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings

MODELS = {
    "dflash": ("DFlashDraftModel", "qwen3_dflash", "DFlashQwen3ForCausalLM"),
    "dspark": ("Qwen3DSparkModel", "qwen3_dspark", "Qwen3DSparkForCausalLM"),
}
# Fields that our files leave out, and what vLLM takes an absent one for
ABSENT = {
    "add_swa_attention_sink_bias": "none", "attention_bias": "none", "dspark_draft_topk": "every token",
    "eagle_config": "dflash_config names the taps", "get": "a method", "has_own_lm_head": "set by the loader",
    "is_causal": "dflash_config.causal", "is_neox_style": "halves turn with each other, as ours do",
    "logit_scale": "1", "rope_parameters": "rope_theta and rope_scaling", "sliding_window": "none",
    "target_hidden_size": "hidden_size", "use_aux_hidden_state": "taps are read",
}  # fmt: skip


@pytest.fixture(params=MODELS)
def exported(request, tmp_path) -> Path:
    draft = tiny_block(tiny_target("llama"), request.param)
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "draft"), to="vllm", output_dir=tmp_path / "out", target="T"))
    return tmp_path / "out"


def sources(vllm_source) -> str:
    return "\n".join(vllm_source(f"model_executor/models/qwen3_{name}.py") for name in ("dflash", "dspark"))


def test_the_class_is_registered(vllm_source, exported):
    architecture = json.loads((exported / "config.json").read_text())["architectures"][0]
    registry = vllm_source("model_executor/models/registry.py")
    assert any(f'"{name}": ("{file}", "{made}")' in registry for name, file, made in MODELS.values()
               if name == architecture)  # fmt: skip


def test_what_is_read_is_stated(vllm_source, exported):
    """A release that reads another field fails here, and somebody looks at what it means."""
    document = json.loads((exported / "config.json").read_text())
    read = fields_read(sources(vllm_source))
    assert read - document.keys() <= ABSENT.keys()
    assert {"markov_rank", "mask_token_id", "layer_types"} <= read  # control: the sources were read


def test_both_layouts_mean_to_vllm_what_they_mean_here(vllm_source):
    """DSpark drafts from the anchor where nothing is stated, DFlash never does: it refuses, or does not look."""
    runner = "v1/worker/gpu/spec_decode"
    assert '"sample_from_anchor", True' in vllm_source(f"{runner}/dspark/speculator.py")
    assert "sample_from_anchor=True is not supported for DFlash" in vllm_source(f"{runner}/dflash/speculator.py")
    assert "sample_from_anchor" not in vllm_source("v1/spec_decode/dflash.py")


def test_every_tensor_has_a_place(vllm_source, exported):
    """Unknown names are passed over in silence: every module on a tensor's path is one of vLLM's network."""
    source = sources(vllm_source) + vllm_source("model_executor/models/qwen2.py")
    known = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "d2t", "t2d"}  # stacked or renamed by the loader
    parts = {part for name in load_file(exported / WEIGHTS) for part in name.split(".") if not part.isdigit()}
    missing = [part for part in parts - known - {"weight", "bias"} if f"self.{part}" not in source]
    assert not missing
    assert all(f'"{part}"' in source or f".{part}" in source for part in known - {"d2t", "t2d"})
    assert '"t2d" in name' in source and 'replace("d2t", "draft_id_to_target_id")' in source
