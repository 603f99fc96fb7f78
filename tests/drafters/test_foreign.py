"""Other trainers' heads, one row each: the same tiny head as that trainer would have written it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_target

from fledge.drafters.eagle3.checkpoint import WEIGHTS, draft_tensors
from fledge.drafters.eagle3.config import from_json, to_json
from fledge.drafters.eagle3.foreign import complete_vocab, config_of, origin_of, read_any
from fledge.drafters.eagle3.head import EMBEDDING, Head
from fledge.errors import UserError

LAYERS = 8  # of the tiny llama: the usual taps are inputs of 2, 4, 5
TAPS = (2, 4, 5)
OUTPUTS = [1, 3, 4]
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
         "rms_norm_eps", "vocab_size", "draft_vocab_size", "max_position_embeddings", "num_hidden_layers")  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
OLD_ROPE = {"rope_theta": 5e5, "rope_scaling": LLAMA3}

MODELOPT = {"use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
            "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": 1}  # fmt: skip
HF_MODELOPT = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "torch_dtype": "float32",
               "rope_theta": None, "rope_scaling": {**LLAMA3, "rope_theta": 5e5},
               "eagle_config": {**MODELOPT, "eagle_aux_hidden_state_layer_ids": OUTPUTS}}  # fmt: skip
# name -> (origin, config.json beside the sizes, layer prefix, tensors left out, weights file)
HEADS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], str]] = {
    "eagle": ("EAGLE or SpecForge", {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **OLD_ROPE},
              "midlayer.", (), "pytorch_model.bin"),
    "angelslim": ("AngelSlim", {"architectures": ["Eagle3LlamaForCausalLM"], "model_type": "llama", **OLD_ROPE,
                  "tie_word_embeddings": False, "pretraining_tp": 1}, "midlayer.", (), WEIGHTS),
    "specforge": ("EAGLE or SpecForge", {"architectures": ["LlamaForCausalLMEagle3"], **OLD_ROPE, "eagle_config": {
                  "use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": OUTPUTS}}, "midlayer.", (),
                  WEIGHTS),
    "modelopt": ("ModelOpt", HF_MODELOPT, "layers.0.", ("t2d",), WEIGHTS),
    "modelopt-megatron": ("ModelOpt", {**HF_MODELOPT, **OLD_ROPE}, "midlayer.", ("t2d",), WEIGHTS),
    "speculators": ("speculators", {"speculators_model_type": "eagle3", "norm_before_residual": False,
                    "eagle_aux_hidden_state_layer_ids": list(TAPS),
                    "transformer_layer_config": {"model_type": "llama", **OLD_ROPE}}, "layers.0.", (), WEIGHTS),
}  # fmt: skip


def ours(eagle31: bool = False) -> Head:
    draft = tiny_draft(tiny_target("llama"), eagle31=eagle31)
    return Head(draft.config, draft_tensors(draft, torch.float32))


def write(folder: Path, name: str, *, head: Head | None = None, **changes: Any) -> Path:
    """The tiny head as the trainer of this row writes it."""
    head = head or ours()
    _, says, prefix, left_out, file = HEADS[name]
    document = {key: value for key, value in to_json(head.config).items() if key in SIZES} | says | changes
    if name == "speculators":
        inner = {key: document.pop(key) for key in SIZES if key != "draft_vocab_size"}
        document["transformer_layer_config"] = {**inner, **document["transformer_layer_config"]}
    tensors = {key.replace("midlayer.", prefix): t for key, t in head.tensors.items() if key not in left_out}
    tensors["embed_tokens.weight"] = tiny_target("llama").embedding_weight.detach().clone()  # most bring a copy
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    torch.save(tensors, folder / file) if file.endswith(".bin") else save_file(tensors, folder / file)
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_every_trainers_head_is_the_same_head(tmp_path, name):
    folder, want = write(tmp_path, name), ours()
    assert origin_of(json.loads((folder / "config.json").read_text())).name == HEADS[name][0]
    found = read_any(folder, num_target_layers=LAYERS)
    assert found.config.tap_layers == TAPS
    for field in (*SIZES[:-1], "rope_parameters", "norm_before_residual"):
        assert getattr(found.config, field) == getattr(want.config, field), field
    assert found.tensors.keys() - {EMBEDDING} == want.tensors.keys()
    assert all(torch.equal(found.tensors[key], want.tensors[key]) for key in want.tensors)


@pytest.mark.parametrize("name", HEADS)
def test_ids_are_guessed_by_nobody(tmp_path, name):
    """Without the target, only the trainers whose files settle it are read; the wrong word gives other taps."""
    folder = write(tmp_path, name)
    if HEADS[name][0] in ("ModelOpt", "speculators"):
        assert read_any(folder).config.tap_layers == TAPS
    else:
        with pytest.raises(UserError, match="names no tap layers|may be inputs of layers.*the target is not given"):
            read_any(folder)
    if name in ("specforge", "modelopt"):
        assert read_any(folder, tap_convention="output").config.tap_layers == TAPS
        assert read_any(folder, tap_convention="input").config.tap_layers == tuple(OUTPUTS)


def test_loading_does_not_guess_either(tmp_path):
    """Ids of another trainer were once read as inputs, whatever they were: accept length 1, without a word."""
    folder = write(tmp_path, "specforge")
    with pytest.raises(UserError, match=r"tap ids \[1, 3, 4\] are inputs or outputs.*fledge convert"):
        from_json(folder / "config.json")


def test_unusual_ids_have_to_be_explained(tmp_path):
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}}
    folder = write(tmp_path, "specforge", **ids)
    with pytest.raises(UserError, match=r"the usual \[2, 4, 5\] fit neither.*--tap-convention"):
        read_any(folder, num_target_layers=LAYERS)
    assert read_any(folder, num_target_layers=LAYERS, tap_convention="output").config.tap_layers == (2, 3, 7)


REFUSED = {
    "eagle quantised": ("eagle", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    "gpt-oss norm": ("specforge", {"norm_before_fc": True}, "one RMSNorm over all taps"),
    "modelopt eagle-1": ("modelopt", {"eagle_config": {**MODELOPT, "use_aux_hidden_state": False}}, "EAGLE-1"),
    "modelopt without norm": (
        "modelopt",
        {"eagle_config": {**MODELOPT, "use_last_layernorm": False}},
        "no norm before",
    ),
    "modelopt parallel": ("modelopt", {"eagle_config": {**MODELOPT, "parallel_draft_step": 4}}, "parallel draft"),
    "speculators peagle": ("speculators", {"speculators_model_type": "peagle"}, "another kind of speculator"),
    "speculators gemma": ("speculators", {"transformer_layer_config": {"model_type": "gemma"}}, "neither Llama's nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_networks_are_refused_with_their_name(tmp_path, case):
    name, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=f"{HEADS[name][0]}.*{message}"):
        read_any(write(tmp_path, name, **changes), num_target_layers=LAYERS)


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The head with some of its tensors replaced, or left out where None."""
    tensors = {
        name: tensor for name, tensor in {**load_file(folder / WEIGHTS), **changes}.items() if tensor is not None
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_an_eagle_1_or_2_head_is_told_what_it_is(tmp_path):
    """Its config reads like an EAGLE-3 head's with a bias and no taps: the error was about those."""
    folder = write(tmp_path, "angelslim", architectures=["LlamaForCausalLM"], bias=True)
    of_eagle3 = ("hidden_norm", "input_layernorm")
    absent = {name: None for name in load_file(folder / WEIGHTS) if any(part in name for part in of_eagle3)}
    rewrite(folder, {**absent, "fc.weight": torch.zeros(64, 128), "lm_head.weight": None, "norm.weight": None})
    with pytest.raises(UserError, match="an EAGLE-1 or EAGLE-2 head .*train an EAGLE-3 head"):
        read_any(folder, num_target_layers=LAYERS)


def test_two_taps_are_no_eagle_2(tmp_path):
    """Negative control: an EAGLE-3 head of two taps has an fc of the same shape."""
    one = ours()
    config = dataclasses.replace(one.config, tap_layers=(2, 5))
    head = Head(config, {**one.tensors, "fc.weight": one.tensors["fc.weight"][:, :128].contiguous()})
    ids = {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 4]}}
    folder = write(tmp_path, "specforge", head=head, **ids)
    assert read_any(folder, num_target_layers=LAYERS, tap_convention="output").config.tap_layers == (2, 5)


@pytest.mark.parametrize("stated", [{"target_hidden_size": 96}, {}])
def test_a_draft_of_another_width_is_named(tmp_path, stated):
    """By its config, or by fc alone."""
    folder = write(tmp_path, "angelslim", **stated)
    rewrite(folder, {"fc.weight": torch.zeros(64, 3 * 96)})
    with pytest.raises(UserError, match="a draft of hidden size 64 for a target of 96"):
        read_any(folder, num_target_layers=LAYERS)


def test_another_activation_is_named(tmp_path):
    with pytest.raises(UserError, match="hidden_act='gelu'; the head's MLP is SwiGLU"):
        read_any(write(tmp_path, "angelslim", hidden_act="gelu"), num_target_layers=LAYERS)


def test_an_absent_residual_flag_means_what_vllm_takes_it_for(tmp_path):
    folder = write(tmp_path, "speculators")
    document = json.loads((folder / "config.json").read_text())
    del document["norm_before_residual"]
    assert config_of(document, TAPS, LAYERS, folder).norm_before_residual
    assert not config_of({**document, "norm_before_residual": False}, TAPS, LAYERS, folder).norm_before_residual


def test_old_names_of_the_tap_norms_and_training_prefixes(tmp_path):
    """SGLang's legacy names, and the prefixes that training checkpoints keep."""
    head = ours(eagle31=True)
    legacy = {"fc_norm.0": "aux_norm_low", "fc_norm.1": "aux_norm_mid", "fc_norm.2": "aux_norm_high"}
    folder = write(tmp_path, "specforge", head=head, norm_output=True, use_aux_norm=True)
    tensors = {}
    for key, tensor in head.tensors.items():
        for new, old in legacy.items():
            key = key.replace(new, old)
        tensors[f"draft_model.{key}"] = tensor
    save_file(tensors, folder / WEIGHTS)
    found = read_any(folder, num_target_layers=LAYERS)
    assert found.config.fc_norm and found.config.norm_output and found.tensors.keys() == head.tensors.keys()


def test_sharded_weights(tmp_path):
    folder = write(tmp_path, "specforge")
    names = sorted(ours().tensors)
    halves = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in halves.items():
        save_file({name: ours().tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    assert read_any(folder, num_target_layers=LAYERS).tensors.keys() == ours().tensors.keys()


def test_each_half_of_a_vocabulary_is_made_from_the_other():
    head = ours()
    d2t, t2d = head.tensors["d2t"], head.tensors["t2d"]
    others = {key: tensor for key, tensor in head.tensors.items() if key not in ("d2t", "t2d")}
    for given in ({"d2t": d2t.int()}, {"t2d": t2d.to(torch.uint8)}):
        full = complete_vocab(others | given, head.config)
        assert torch.equal(full["d2t"], d2t) and torch.equal(full["t2d"], t2d)
    assert "d2t" not in complete_vocab(others, head.config)  # neither: nothing is invented, check_head names both


def test_a_trivial_mapping_of_a_whole_vocabulary_is_dropped():
    draft = tiny_draft(tiny_target("llama"), draft_vocab_size=None)
    tensors = draft_tensors(draft, torch.float32)
    trivial = {"d2t": torch.zeros(128, dtype=torch.int64), "t2d": torch.ones(128, dtype=torch.bool)}
    assert complete_vocab(tensors | trivial, draft.config).keys() == tensors.keys()
