"""What the engines read, against their own sources; and every head they would swallow, named before they see it."""

import ast
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from engine_fields import fields_read
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_target

from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.drafters.eagle3.config import to_json
from fledge.drafters.eagle3.foreign import read_config
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.engines import ENGINES, SGLANG, VLLM, check_servable, file_shapes, problems
from fledge.export.settings import ExportSettings

LLAMA = '"llama_eagle3", "Eagle3LlamaForCausalLM"'
LOADERS = {"vllm": "model_executor/models/llama_eagle3.py", "sglang": "srt/models/llama_eagle3.py"}


@pytest.mark.parametrize("name", ENGINES)
def test_our_table_is_what_the_engine_reads(request, name):
    """Field by field; a new release that reads another field fails here, and somebody looks at what it means."""
    source = request.getfixturevalue(f"{name}_source")(LOADERS[name])
    assert fields_read(source) == set(ENGINES[name].reads)


def test_the_comparison_can_fail():
    assert fields_read("class A:\n  def f(self, config):\n    return config.new + getattr(self.config, 'old', 1)") == {
        "new", "old"}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_registered_architectures(request, name):
    """Every architecture we let pass leads to the loader we read; ours is among them."""
    source = request.getfixturevalue(f"{name}_source")
    for architecture in ENGINES[name].architectures:
        if name == "sglang":
            assert f"class {architecture}(" in source(LOADERS[name])
        else:
            loader = '"qwen3_eagle3", "Eagle3Qwen3ForCausalLM"' if "Qwen3For" in architecture else LLAMA
            line = f'"{architecture}": ({loader})'
            assert line in source("model_executor/models/registry.py")
    assert to_json(tiny_draft(tiny_target("llama")).config)["architectures"][0] in ENGINES[name].architectures


@pytest.mark.parametrize("name", ENGINES)
def test_every_field_it_cannot_do_without_is_in_our_export(name, tmp_path):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    export_head(ExportSettings(head=str(tmp_path / "head"), to=name, output_dir=tmp_path / "out"))
    document = read_config(tmp_path / "out")
    optional = {"num_aux_hidden_states", "logit_scale", "bias", "intermediate_size_mlp", "use_aux_norm",
                "norm_before_fc", "norm_before_residual"}  # absent means what our head is  # fmt: skip
    assert set(ENGINES[name].reads) - optional <= document.keys()


# -- vLLM's two model runners ------------------------------------------------------------------------------------------

RUNNERS = {
    "V1": ("v1/worker/gpu_model_runner.py", "_get_eagle3_aux_layers_from_config"),
    "V2": ("v1/worker/gpu/spec_decode/eagle/eagle3_utils.py", "get_eagle3_aux_layers_from_config"),
}


def taps_read_by(runner, source, document):
    """The tap layers that a runner of vLLM finds in a head's config.json, by its own function; None: its default."""
    path, name = RUNNERS[runner]
    function = next(n for n in ast.walk(ast.parse(source(path))) if isinstance(n, ast.FunctionDef) and n.name == name)
    function.returns = function.args.args[0].annotation = None
    scope = {}
    exec(compile(ast.Module([function], []), path, "exec"), scope)
    of_draft = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**document)))
    return scope[name](SimpleNamespace(speculative_config=of_draft) if runner == "V1" else of_draft)


@pytest.mark.parametrize("runner", RUNNERS)
def test_both_runners_of_vllm_find_our_taps(exported, vllm_source, runner):
    """The V2 runner, the default on GPUs, passes over ids that stand in eagle_config only (SpecForge, ModelOpt)."""
    document = read_config(exported / "vllm")
    taps = tuple(document["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    assert taps_read_by(runner, vllm_source, document) == taps
    del document["eagle_aux_hidden_state_layer_ids"]
    assert taps_read_by(runner, vllm_source, document) == (taps if runner == "V1" else None)


def test_ids_in_one_place_are_fine_where_they_are_the_usual_ones(exported):
    document = read_config(exported / "vllm")
    del document["eagle_aux_hidden_state_layer_ids"]
    text_config = tiny_target("llama").text_config
    assert problems(VLLM, document, file_shapes(exported / "vllm"), text_config) == []
    document["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    (problem,) = problems(VLLM, document, file_shapes(exported / "vllm"), text_config)
    assert "eagle_config only: vLLM's V2 runner would take" in problem


# -- heads that would be swallowed -------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    for layout in ("vllm", "sglang", "speculators"):
        export_head(ExportSettings(head=str(tmp_path / "head"), to=layout, output_dir=tmp_path / layout, target="T"))
    return tmp_path


READERS = [(VLLM, "vllm"), (VLLM, "speculators"), (SGLANG, "sglang")]


@pytest.mark.parametrize(("engine", "layout"), READERS, ids=lambda value: getattr(value, "name", value))
def test_our_exports_are_fine(exported, engine, layout):
    check_servable(exported / layout, engine, tiny_target("llama").text_config)


SICK = {
    "another architecture": (VLLM, "vllm", {"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM"),
    "no model_type": (VLLM, "vllm", {"model_type": None}, "no model_type"),
    "tied": (SGLANG, "sglang", {"tie_word_embeddings": True}, "lm_head of its own"),
    "residual": (SGLANG, "sglang", {"norm_before_residual": True}, "which it ignores"),
    "sizes": (VLLM, "vllm", {"intermediate_size": 95}, r"gate_proj.weight is \(96, 64\), not \(95, 64\)"),
    "no sizes": (VLLM, "vllm", {"hidden_size": None}, "hidden_size missing"),
    "outputs by mark": (VLLM, "sglang", {}, "name layer outputs, vLLM reads them as inputs"),
    "inputs by mark": (SGLANG, "vllm", {}, "name layer inputs, SGLang reads them as outputs"),
    "outputs by the usual three": (VLLM, "sglang", {"fledge": None}, "name layer outputs"),
    "speculators for SGLang": (SGLANG, "speculators", {}, "not read by SGLang"),
    "speculators model_type": (VLLM, "speculators", {"model_type": "llama"}, "breaks the loading"),
    "speculators verifier": (VLLM, "speculators", {"speculators_config": {"proposal_methods": []}}, "verifier's name"),
    "speculators kind": (VLLM, "speculators", {"speculators_model_type": "eagle"}, "not eagle3"),
}  # fmt: skip


@pytest.mark.parametrize("case", SICK)
def test_what_the_config_would_do_is_said(exported, case):
    engine, layout, changes, message = SICK[case]
    path = exported / layout / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=f"would not draft in {engine.title}.*{message}"):
        check_servable(exported / layout, engine, tiny_target("llama").text_config)


@pytest.mark.parametrize(("name", "message"), [("lm_head.weight", "runs without"), ("d2t", "d2t missing; it runs"),
                                                ("norm.weight", "norm.weight missing")])  # fmt: skip
def test_missing_tensors(exported, name, message):
    """vLLM takes the target's whole head for a missing lm_head, and zeros for a missing d2t, without a word."""
    tensors = load_file(exported / "vllm" / WEIGHTS)
    del tensors[name]
    save_file(tensors, exported / "vllm" / WEIGHTS)
    with pytest.raises(UserError, match=message):
        check_servable(exported / "vllm", VLLM)


def test_unknown_tensors_and_a_torn_file(exported):
    tensors = load_file(exported / "vllm" / WEIGHTS) | {"midlayer.self_attn.q_norm.weight": torch.ones(16)}
    save_file(tensors, exported / "vllm" / WEIGHTS)
    with pytest.raises(UserError, match="unknown tensors midlayer.self_attn.q_norm"):
        check_servable(exported / "vllm", VLLM)
    (exported / "vllm" / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        check_servable(exported / "vllm", VLLM)


def test_an_old_file_is_read_for_its_shapes(exported):
    """vLLM loads pytorch_model.bin, so it is no reason to refuse."""
    tensors = load_file(exported / "vllm" / WEIGHTS)
    (exported / "vllm" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="Is the download complete"):
        check_servable(exported / "vllm", VLLM)
    torch.save(tensors, exported / "vllm" / "pytorch_model.bin")
    check_servable(exported / "vllm", VLLM)


def test_four_taps_need_their_number_in_the_speculators_layout(exported):
    document = read_config(exported / "speculators")
    document["eagle_aux_hidden_state_layer_ids"] = [1, 2, 4, 5]
    assert any("num_aux_hidden_states" in p for p in problems(VLLM, document, file_shapes(exported / "speculators")))


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_another_target(exported, field):
    other = copy.copy(tiny_target("llama").text_config)
    setattr(other, field, 999)
    with pytest.raises(UserError, match=f"{field} is .*the target's 999"):
        check_servable(exported / "vllm", VLLM, other)
