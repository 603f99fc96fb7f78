"""The target wrapper against the library's own answers, over the table of tiny targets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NAMES, prompt, tiny_model, tiny_target

from fledge.data.tokenize import Sample
from fledge.errors import UserError
from fledge.target import quirks
from fledge.target.live import LiveSource
from fledge.target.model import Target


def expected_states(target: Target, ids: torch.Tensor):
    with torch.inference_mode():
        return target.model(input_ids=ids, output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("name", NAMES)
def test_taps_and_head_are_the_models_own(name):
    target = tiny_target(name)
    ids = torch.tensor([prompt(11), prompt(11, seed=1)])
    expected, found = expected_states(target, ids), target.forward(ids)
    for index, layer in enumerate(target.tap_layers):
        assert torch.equal(found.tap_hidden[:, :, index], expected.hidden_states[layer])
    assert torch.equal(found.last_hidden, expected.hidden_states[-1])
    torch.testing.assert_close(target.head(found.last_hidden), expected.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tap_comparison_notices_a_shift_by_one(name):
    target = tiny_target(name)
    ids = torch.tensor([prompt(11)])
    expected, found = expected_states(target, ids), target.forward(ids)
    layer = target.tap_layers[0]
    assert not torch.allclose(found.tap_hidden[:, :, 0], expected.hidden_states[layer + 1], atol=1e-2)


def test_no_taps_when_not_asked_for():
    target = tiny_target("llama")
    assert target.forward(torch.tensor([prompt(5)]), taps=False).tap_hidden is None


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "granite"])
def test_a_missing_quirk_is_found_on_loading(name, monkeypatch):
    monkeypatch.delitem(quirks.LOGIT_QUIRKS, name)
    with pytest.raises(UserError, match=r"differs from the model's logits .*target/quirks\.py"):
        Target(tiny_model(name), tap_layers=(1, 2, 3), name="no-quirk")


def test_default_taps_are_those_of_eagle3():
    assert tiny_target("llama").tap_layers == (2, 4, 5)


@pytest.mark.parametrize("taps", [None, (0, 1, 4), (1, 1, 2), (2, 1, 3), (-1, 1, 2)])
def test_taps_that_do_not_fit_are_refused(taps):
    with pytest.raises(UserError, match="distinct, ascending layers of a target with 4 layers"):
        Target(tiny_model("qwen3"), tap_layers=taps, name="four-layers")


def test_eos_ids_are_the_generation_configs_list_first():
    model = tiny_model("qwen3")
    target = Target(model, tap_layers=(1, 2, 3))
    assert target.eos_token_ids == (3,)
    model.generation_config.eos_token_id = [3, 9]
    assert target.eos_token_ids == (3, 9)


def sample(ids: list[int], name: str) -> Sample:
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(ids) // 2 :] = True
    return Sample(id=name, input_ids=torch.tensor(ids), loss_mask=mask)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "deepseek_v3"])
def test_a_record_depends_on_its_own_sample_alone(name):
    source = LiveSource(tiny_target(name))
    first, other = sample(prompt(13), "a"), sample(prompt(9, seed=4), "b")
    alone = source.record(first)
    source.record(other)
    again = source.record(first)
    for field in ("input_ids", "loss_mask", "position_ids", "tap_hidden", "last_hidden"):
        assert torch.equal(getattr(alone, field), getattr(again, field)), field
    assert len(alone) == 13 and alone.sample_id == "a"


def test_record_tensors_can_be_trained_on():
    """Inference tensors cannot be saved for a backward pass; a record's can."""
    record = LiveSource(tiny_target("llama")).record(sample(prompt(6), "a"))
    weight = torch.ones(64, requires_grad=True)
    (record.last_hidden * weight).sum().backward()
    assert torch.allclose(weight.grad, record.last_hidden.sum(0))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny target with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{index}>": index for index in range(128)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")))
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_a_sound_folder_loads(folder):
    target = Target.from_pretrained(str(folder), device="cpu")
    ids = torch.tensor([prompt(7)])
    assert torch.equal(target.forward(ids).last_hidden, tiny_target("llama").forward(ids).last_hidden)
    assert target.tokenizer is not None and target.dtype == torch.float32


def spoil_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_nan, r"1 weights contain NaN or infinity, first model\.layers\.3\.mlp\.up_proj\.weight"),
        (spoil_missing, r"1 weights are missing .*model\.layers\.3\.mlp\.up_proj\.weight"),
        (spoil_truncated, "could not be loaded as a causal LM"),
        (spoil_config, "no config.json there"),
        (shutil.rmtree, "no such folder"),
        (spoil_type, "could not be loaded as a causal LM .*no_such_model"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_it(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        Target.from_pretrained(str(folder), device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
