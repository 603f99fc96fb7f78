"""The draft config: derived from the target, and back from its own JSON."""

import dataclasses
import json

import pytest
import torch
from tiny import NAMES, tiny_config, tiny_draft, tiny_target

from fledge.drafters.eagle3.config import DraftConfig, derive, from_json, read_overrides, to_json
from fledge.errors import UserError

# deepseek_v3 rotates a slice of its own (qk_rope_head_dim) inside latent attention; the draft's heads are plain ones.
PLAIN_ROPE = [name for name in NAMES if name != "deepseek_v3"]


def target_inv_freq(target) -> torch.Tensor:
    """Of several rotary tables (gemma3), the one of the full-attention layers."""
    found = {
        name: buffer
        for name, buffer in target.model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and "sliding" not in name
    }
    assert len(found) == 1, found.keys()
    return next(iter(found.values()))


@pytest.mark.parametrize("name", PLAIN_ROPE)
def test_rope_is_the_targets(name):
    target = tiny_target(name)
    draft = tiny_draft(target)
    assert torch.equal(draft.rotary.inv_freq, target_inv_freq(target))
    cos, _ = draft.rope(torch.arange(4))
    assert cos.shape == (4, 2 * len(draft.rotary.inv_freq))


def test_rope_survives_the_json(tmp_path):
    for name in PLAIN_ROPE:
        config = tiny_config(tiny_target(name))
        path = tmp_path / "config.json"
        path.write_text(json.dumps(to_json(config)))
        assert from_json(path) == config, name


def test_rope_comparison_notices_another_theta():
    target = tiny_target("qwen3")
    config = dataclasses.replace(tiny_config(target), rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    from fledge.drafters.eagle3.model import DraftModel

    assert not torch.equal(DraftModel(config, target.embedding_weight).rotary.inv_freq, target_inv_freq(target))


def test_hunyuan_alpha_becomes_a_plain_base():
    """Hunyuan calls its fixed stretch "dynamic" with an alpha no other architecture reads; llama drafts ignored it."""
    config = tiny_config(tiny_target("hunyuan_v1_dense"))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4 * 1000.0 ** (16 / 14)}


def test_sizes_are_the_targets():
    config = tiny_config(tiny_target("qwen3"))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)  # not 64 / 4
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 96, 128)
    assert (config.draft_vocab_size, config.tap_layers, config.target_layers) == (48, (1, 2, 3), 4)
    assert config.max_position_embeddings == 256 and config.rms_norm_eps == 1e-6


def test_latent_attention_gets_plain_heads():
    config = tiny_config(tiny_target("deepseek_v3"))
    assert config.num_attention_heads * config.head_dim == 64


def test_draft_vocab_size_larger_than_the_vocabulary_keeps_all():
    target = tiny_target("llama")
    for size in (None, 10_000):
        config = derive(target.text_config, vocab_size=128, tap_layers=(2, 4, 5), draft_vocab_size=size)
        assert config.full_vocab and config.draft_vocab_size == 128


def test_eagle31_is_both_norms():
    config = tiny_config(tiny_target("llama"), eagle31=True)
    assert config.fc_norm and config.norm_output
    assert to_json(config)["fc_norm"] and to_json(config)["norm_output"]


def test_json_is_what_engines_read():
    document = to_json(tiny_config(tiny_target("llama")))
    assert document["architectures"] == ["LlamaForCausalLMEagle3"] and document["model_type"] == "llama"
    assert document["num_hidden_layers"] == 1 and document["tie_word_embeddings"] is False
    assert document["rope_theta"] == 5e5 and document["rope_scaling"]["rope_type"] == "llama3"
    assert document["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"draft_vocab_size": 0}, "draft_vocab_size=0 must be at least 1"),
        ({"draft_vocab_size": 129}, r"must lie in 1\.\.128"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny_config(tiny_target("llama")), **change)


def test_overrides_take_sizes_and_name_the_nearest_key(tmp_path):
    path = tmp_path / "draft.json"
    path.write_text(json.dumps({"intermediate_size": 200, "rope_theta": 7.0, "draft_vocab_size": 64, "fc_norm": True}))
    assert read_overrides(path) == {"intermediate_size": 200, "draft_vocab_size": 64, "fc_norm": True}
    path.write_text(json.dumps({"intermediate_sise": 200}))
    with pytest.raises(UserError, match="'intermediate_sise' .did you mean 'intermediate_size'"):
        read_overrides(path)


def write(path, document) -> None:
    path.write_text(document if isinstance(document, str) else json.dumps(document))


def document_of(**changes) -> dict:
    return {**to_json(tiny_config(tiny_target("llama"))), **changes}


@pytest.mark.parametrize(
    "document, message",
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "Expected `object`, got `array`"),
        (document_of(architectures=["LlamaForCausalLM"]), "'LlamaForCausalLM' is no EAGLE-3 head"),
        (document_of(hidden_size=None), "missing hidden_size"),
        (document_of(eagle_aux_hidden_state_layer_ids=None, eagle_config=None), "missing eagle_aux_hidden_state_layer"),
    ],
)
def test_a_bad_config_file_is_a_user_error(tmp_path, document, message):
    path = tmp_path / "config.json"
    if document is not None:
        write(path, document)
    with pytest.raises(UserError, match=message) as caught:
        from_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_old_rope_fields_are_read(tmp_path):
    """Heads of older trainers carry rope_theta and rope_scaling with `type`."""
    path = tmp_path / "config.json"
    scaling = {"type": "linear", "factor": 4.0}
    write(path, document_of(rope_parameters=None, rope_theta=1e6, rope_scaling=scaling))
    config = from_json(path)
    assert isinstance(config, DraftConfig)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
