"""The rope we say an engine computes is what its own source computes, and a head it would turn otherwise is named."""

import ast
import dataclasses
import json
import math
import typing
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_draft, tiny_target
from torch import nn

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.drafters.eagle3.config import from_json, to_json
from fledge.drafters.layer_config import rope_of
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.engine_rope import engine_rope, rope_problem, trained_rope
from fledge.export.engines import ENGINES, SGLANG, check_servable
from fledge.export.layouts import LAYOUTS
from fledge.export.settings import ExportSettings

LENGTHS = {"original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "half": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTHS},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **LENGTHS},
    "yarn, untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, **LENGTHS},
    "yarn, two scales": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **LENGTHS},
    "yarn, own scale": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **LENGTHS},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                 "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7], **LENGTHS},
    "longrope, own factor": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                             "factor": 32.0, **LENGTHS},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}  # fmt: skip
UNLIKE = {"vllm": {"longrope, own factor"}, "sglang": {"longrope, own factor", "dynamic"}}
"""Ropes that the engine has no fields to be told of: such a head is refused."""
MAX_POSITION = 256


def head_config(rope):
    config = tiny_draft(tiny_target("llama")).config
    return dataclasses.replace(
        config, rope_parameters={"rope_theta": 1e4, **rope}, max_position_embeddings=MAX_POSITION
    )


def exported(engine, config):
    return json.loads(json.dumps(LAYOUTS[engine].describe(config, "float32", "T")))


# -- the engines' own sources ------------------------------------------------------------------------------------------

SOURCES = {
    "vllm": ("model_executor/layers/rotary_embedding/",
             ("__init__", "base", "common", "linear_scaling_rope", "llama3_rope", "yarn_scaling_rope", "gemma4_rope",
              "dynamic_ntk_scaling_rope", "dynamic_ntk_alpha_rope", "phi3_long_rope_scaled_rope")),
    "sglang": ("srt/layers/rotary_embedding/", ("factory", "base", "yarn", "rope_variant")),
}  # fmt: skip
PURE = {"_compute_inv_freq", "_compute_cos_sin_cache"}


class Base(nn.Module):
    """The engines' base class without kernels: sizes, and the table of cos and sin."""

    def __init__(self, head_size, rotary_dim, max_position_embeddings, base, is_neox_style, dtype, **_):
        super().__init__()
        self.head_size, self.rotary_dim, self.base, self.dtype = head_size, rotary_dim, base, dtype
        self.max_position_embeddings, self.is_neox_style, self.position_start = max_position_embeddings, True, 0
        self._force_native = False
        self.cos_sin_cache = self._compute_cos_sin_cache()


SCOPES = {}


def engine_scope(name, source):
    """Functions and rope classes of an engine, executed from its files; kernels are left out."""
    if name in SCOPES:
        return SCOPES[name]
    folder, files = SOURCES[name]
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=MAX_POSITION))
    scope = {
        "torch": torch, "nn": nn, "math": math, "_ROPE_DICT": {},
        **{key: getattr(typing, key) for key in typing.__all__},
        "_get_live_rope_cache_entry": lambda key: None, "get_current_vllm_config": lambda: config, "Base": Base,
        "logger": SimpleNamespace(warning=lambda *_: None, warning_once=lambda *_: None),
        "init_logger": lambda _: None, "_is_cuda": False, "_is_npu": False,
    }  # fmt: skip
    for file in files:
        for node in ast.parse(source(f"{folder}{file}.py")).body:
            if isinstance(node, ast.FunctionDef) and node.name != "_get_live_rope_cache_entry":
                node.decorator_list = []
            elif isinstance(node, ast.ClassDef) and node.name in ("RotaryEmbedding", "RotaryEmbeddingBase"):
                node.body = [part for part in node.body if getattr(part, "name", "") in PURE] or [ast.Pass()]
                node.decorator_list, node.bases = [], [ast.Name("Base", ast.Load())]
                scope.pop("RotaryEmbedding", None) if node.name == "RotaryEmbeddingBase" else None
                if node.name == "RotaryEmbedding" and "RotaryEmbeddingBase" in scope:
                    node.bases = [ast.Name("RotaryEmbeddingBase", ast.Load())]
            elif not (isinstance(node, ast.ClassDef) and node.name.endswith("RotaryEmbedding")):
                continue
            else:
                node.decorator_list = []
            code = ast.fix_missing_locations(ast.Module([node], []))
            try:
                exec(compile(code, file, "exec", flags=__import__("__future__").annotations.compiler_flag), scope)
            except NameError:
                assert node.name not in ("get_rope", "RotaryEmbedding"), node.name  # a base of a kernel that no row has
    SCOPES[name] = scope
    return scope


def rope_of_engine(name, source, document):
    """The engine's own rope module for a head of this config.json."""
    get_rope, rope = engine_scope(name, source)["get_rope"], document["rope_parameters"]
    head_dim, length = document["head_dim"], document["max_position_embeddings"]
    if name == "vllm":
        return get_rope(head_dim, max_position=length, rope_parameters=rope)
    share = document.get("partial_rotary_factor", 1)  # models/llama.py
    return get_rope(head_dim, rotary_dim=int(share * head_dim), max_position=length, base=rope["rope_theta"],
                    rope_scaling=rope)  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ENGINES)
def test_we_say_what_the_engine_computes(request, name, kind):
    config = head_config(ROPES[kind])
    document = exported(name, config)
    module = rope_of_engine(name, request.getfixturevalue(f"{name}_source"), document)
    ours = engine_rope(name, document, config)
    tables = [module.cos_sin_cache] if len(ours.frequencies) == 1 else list(
        module.long_short_cos_sin_cache.split([LENGTHS["original_max_position_embeddings"], MAX_POSITION]))  # fmt: skip
    for table, frequencies in zip(tables, ours.frequencies, strict=True):
        angles = torch.arange(48.0)[:, None] * frequencies
        expected = torch.cat((angles.cos(), angles.sin()), -1) * ours.scale
        torch.testing.assert_close(table[:48].float(), expected, rtol=1e-4, atol=1e-4)


# -- what follows for a head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ENGINES)
def test_our_exports_turn_as_the_head_was_trained(name, kind):
    config = head_config(ROPES[kind])
    problem = rope_problem(name, exported(name, config), config)
    assert (problem is not None) == (kind in UNLIKE[name]), problem


def test_speculators_layout_turns_as_the_head_was_trained():
    config = head_config(ROPES["half"])
    layer = LAYOUTS["speculators"].describe(config, "float32", "T")["transformer_layer_config"]
    assert rope_problem("vllm", layer, config) is None


def test_a_share_that_sglang_does_not_find_is_named(tmp_path):
    """Partly rotated heads (glm4, phi, nemotron ...) were exported with the share inside rope_parameters only.
    SGLang reads it at the top level: it turned 16 of 16 dimensions where the head had learned with 8, and inspect was
    content."""
    save_draft(tiny_draft(tiny_target("glm4")), tmp_path / "head")
    export_head(ExportSettings(head=str(tmp_path / "head"), to="sglang", output_dir=tmp_path / "out"))
    check_servable(tmp_path / "out", SGLANG)
    path = tmp_path / "out" / "config.json"
    document = json.loads(path.read_text())
    assert document.pop("partial_rotary_factor") == 0.5
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="in SGLang: it rotates 16 dimensions of a head instead of 8"):
        check_servable(tmp_path / "out", SGLANG)


def test_numbers_and_not_names_are_compared():
    config = head_config(ROPES["yarn, own scale"])
    document = to_json(config)
    assert rope_problem("vllm", document, config) is None
    assert "scales cos and sin by 1.139 instead of 1.3" in rope_problem("sglang", document, config)
    plain = dataclasses.replace(config, rope_parameters={**config.rope_parameters, "rope_theta": 1e5})
    assert "radians a position" in trained_rope(plain).difference(trained_rope(config))
    unknown = dataclasses.replace(config, rope_parameters={"rope_type": "new", "rope_theta": 1e4})
    assert "rope_type 'new' is not one it knows" in rope_problem("vllm", document, unknown)


def test_a_proportional_rope_is_gemma_4s_own(tmp_path):
    """A head for Gemma 4 turned a quarter of each head as one block; its target turns pairs across the whole head."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    text = Gemma4TextConfig(  # type: ignore[call-arg]  # its older fields go into **kwargs
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16,
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=MAX_POSITION,
    )  # fmt: skip
    config = head_config(rope_of(text))
    assert config.rope_parameters["rope_type"] == "proportional"
    ours, positions = tiny_draft(tiny_target("llama")), torch.arange(32)
    from fledge.drafters.eagle3.model import DraftModel

    draft = DraftModel(config, ours.embedding)
    theirs = Gemma4TextRotaryEmbedding(text)(torch.zeros(1), positions[None], layer_type="full_attention")
    for mine, wanted in zip(draft.rope(positions), theirs, strict=True):
        torch.testing.assert_close(mine, wanted[0])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    assert from_json(path).rope_parameters == config.rope_parameters
