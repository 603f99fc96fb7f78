"""Our export in SGLang's own model and loading code (its wheel's source, on a CPU; see sglang_stubs)."""

import ast
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sglang_stubs import load_module
from tiny import tiny_draft, tiny_target
from transformers import LlamaConfig

from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.drafters.eagle3.head import read_head
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings

T = 9
LOADER = "srt/models/llama_eagle3.py"


@pytest.fixture(params=[(False, 1), (True, 1), (True, 3)], ids=["eagle3", "eagle3.1", "three layers"])
def pair(request, tmp_path, sglang_source):
    """(our draft, our head's folder, SGLang's model with our export's weights)"""
    eagle31, layers = request.param
    draft = tiny_draft(tiny_target("llama"), eagle31=eagle31, num_layers=layers)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 1:  # norms of ones would hide an exchanged one
                parameter.copy_(
                    1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    save_draft(draft, tmp_path / "head", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "head"), to="sglang", output_dir=tmp_path / "out"))
    model = engine_model(sglang_source(LOADER), tmp_path / "out")
    return draft, tmp_path / "head", model


def engine_model(source: str, folder: Any) -> Any:
    module = load_module(source)
    config = LlamaConfig.from_pretrained(folder)
    model = module.LlamaForCausalLMEagle3(config)
    model.load_weights(load_file(folder / WEIGHTS).items())
    return model


def test_every_parameter_arrives(pair):
    """Its loader passes over names it does not know and leaves the rest as they were: here, NaN."""
    _, folder, model = pair
    left = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    unused = {f"model.layers.{layer}.input_layernorm.weight" for layer in range(1, len(model.model.layers))}
    assert left == {"model.embed_tokens.weight", *unused}  # taken from the target when the engine starts; never read
    assert torch.equal(model.hot_token_id, read_head(folder).target_ids)
    assert not model.load_lm_head_from_target and model.lm_head.weight.shape[0] == len(model.hot_token_id)


@torch.no_grad()
def test_it_computes_what_our_head_computes(pair):
    draft, _, model = pair
    model.model.embed_tokens.weight.copy_(draft.embedding)
    generator = torch.Generator().manual_seed(0)
    ids, positions = torch.randint(0, 128, (T,), generator=generator), torch.arange(3, 3 + T)
    taps = torch.randn(T, 3, 64, generator=generator) * torch.tensor([0.5, 2.0, 8.0])[:, None]
    for features in (taps.flatten(1), draft.fuse(taps) + 1):  # the target's states, then a later step's own feedback
        batch = SimpleNamespace(
            mm_input_embeds=None, spec_info=SimpleNamespace(hidden_states=features),
            forward_mode=SimpleNamespace(is_extend=lambda: False),
        )  # fmt: skip
        normed, (fed_back,) = model.model(ids, positions, batch)
        ours = our_step(draft, ids, draft.fuse(taps) if features.shape[1] != 64 else features, positions)
        torch.testing.assert_close(normed @ model.lm_head.weight.T, draft.logits(ours), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fed_back, draft.feedback(ours), rtol=1e-4, atol=1e-4)


def our_step(draft, ids, hidden, positions):
    cache = SimpleNamespace(update=lambda keys, values, layer: (keys, values))
    return draft.step(ids[None], hidden[None], positions[None], cache)[0]


@torch.no_grad()
def test_the_comparison_sees_an_exchanged_norm(pair):
    """Negative control."""
    draft, _, model = pair
    model.model.embed_tokens.weight.copy_(draft.embedding)
    layer = model.model.layers[0]
    layer.input_layernorm, layer.hidden_norm = layer.hidden_norm, layer.input_layernorm
    with pytest.raises(AssertionError, match="not close"):
        test_it_computes_what_our_head_computes((draft, None, model))


def test_ids_become_the_layers_we_tap(pair, sglang_source):
    """SGLang's own method turns the ids of our export into the layers whose inputs it captures."""
    draft, folder, _ = pair
    document = json.loads((folder.parent / "out" / "config.json").read_text())
    ids = document["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    tree = ast.parse(sglang_source("srt/models/llama.py"))
    method = next(node for node in ast.walk(tree)
                  if isinstance(node, ast.FunctionDef) and node.name == "set_eagle3_layers_to_capture")  # fmt: skip
    scope: dict[str, Any] = {"Optional": Any, "List": list}
    method.args.args[1].annotation = None
    exec(compile(ast.Module([method], []), "llama.py", "exec"), scope)
    engine = SimpleNamespace(pp_group=SimpleNamespace(is_last_rank=True), model=SimpleNamespace(),
                             config=SimpleNamespace(num_hidden_layers=8))  # fmt: skip
    scope[method.name](engine, ids)
    assert tuple(engine.model.layers_to_capture) == draft.config.tap_layers
    scope[method.name](engine, None)  # its default, where a head names none
    assert tuple(engine.model.layers_to_capture) == (2, 4, 5)


def test_a_full_vocabulary_needs_no_mapping(tmp_path, sglang_source):
    draft = tiny_draft(tiny_target("llama"), draft_vocab_size=None)
    save_draft(draft, tmp_path / "head", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "head"), to="sglang", output_dir=tmp_path / "out"))
    model = engine_model(sglang_source(LOADER), tmp_path / "out")
    assert model.hot_token_id is None and not model.load_lm_head_from_target
    assert torch.equal(model.lm_head.weight, draft.lm_head.weight)


def test_a_tied_flag_would_replace_lm_head(tmp_path, sglang_source):
    """Why tie_word_embeddings is an error in `fledge inspect`: the engine drafts with the embedding, silently."""
    draft = tiny_draft(tiny_target("llama"))
    save_draft(draft, tmp_path / "head", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "head"), to="sglang", output_dir=tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    module = load_module(sglang_source(LOADER))
    model = module.LlamaForCausalLMEagle3(LlamaConfig.from_pretrained(tmp_path / "out"))
    assert model.lm_head is model.model.embed_tokens and model.lm_head.weight.shape[0] == 128
