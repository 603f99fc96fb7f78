"""What vLLM makes of a head with a multimodal rope: its own config reader, its own rotary module, our numbers.

No target is run here (test_pictures_vllm.py does that): the classes that read a head's config.json and turn its queries
need none. Read besides, in vLLM 0.32: the draft's `embed_input_ids` ignores pictures, so a
placeholder enters the head as its token's embedding (as in our training); a row's position is the feature's, and every
draft step adds one to all axes; taps of Qwen3-VL hold the DeepStack features, as our hooks see them.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import tiny_draft
from tiny_vlm import tiny_vlm

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.drafters.layers import rotate

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
READ = """
import json, sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import get_config, mrope_num_dims, uses_mrope
asked = json.load(sys.stdin)
found = {}
for name, folder in asked["folders"].items():
    config = get_config(folder, trust_remote_code=False)
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(config.head_dim, max_position=config.max_position_embeddings, is_neox_style=True,
                        rope_parameters=config.rope_parameters, dtype=torch.float32)
    positions, queries = torch.tensor(asked["positions"]), torch.tensor(asked["queries"])
    turned = rope.forward_native(positions, queries.clone(), queries.clone())[0]
    known = ModelRegistry.models[config.architectures[0]]
    found[name] = {
        "class": known.class_name, "uses_mrope": uses_mrope(config), "axes": mrope_num_dims(config),
        "rotary": type(rope).__name__, "section": list(rope.mrope_section), "interleaved": rope.mrope_interleaved,
        "taps": config.eagle_config["eagle_aux_hidden_state_layer_ids"], "turned": turned.tolist(),
        "fields": {key: getattr(config, key) for key in asked["fields"]},
    }
print("FOUND " + json.dumps(found))
"""
FIELDS = ("hidden_size", "target_hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "draft_vocab_size", "hidden_act",
          "max_position_embeddings", "tie_word_embeddings", "attention_bias", "norm_output", "fc_norm")  # fmt: skip


def test_vllm_reads_the_targets_rope_from_the_head(vllm_program, tmp_path):
    heads = {name: tiny_draft(tiny_vlm(name)) for name in FAMILIES}
    for name, head in heads.items():
        save_draft(head, tmp_path / name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 400, (3, 20), generator=generator)
    config = heads["qwen3_vl"].config
    queries = torch.randn(20, config.num_attention_heads * config.head_dim, generator=generator)
    asked = {"folders": {name: str(tmp_path / name) for name in FAMILIES}, "positions": positions.tolist(),
             "queries": queries.tolist(), "fields": FIELDS}  # fmt: skip
    python = Path(vllm_program).resolve().parent / "python"
    made = subprocess.run(
        [str(python), "-c", READ], input=json.dumps(asked), capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout.split("FOUND ")[1])
    for name, head in heads.items():
        seen, stated = found[name], json.loads((tmp_path / name / "config.json").read_text())
        assert (seen["class"], seen["uses_mrope"], seen["axes"]) == ("Eagle3LlamaForCausalLM", True, 3)
        assert seen["rotary"] == "MRotaryEmbedding" and seen["taps"] == list(head.config.tap_layers)
        assert seen["section"] == head.config.rope_parameters["mrope_section"]
        assert seen["interleaved"] == (name == "qwen3_vl")
        assert seen["fields"] == {key: stated[key] for key in FIELDS}
        ours = rotate(queries.unflatten(-1, (-1, config.head_dim)), *head.rope(positions)).flatten(-2)
        torch.testing.assert_close(torch.tensor(seen["turned"]), ours, rtol=1e-4, atol=1e-4)
    assert found["qwen2_5_vl"]["turned"] != found["qwen3_vl"]["turned"], "the control: layouts differ"
