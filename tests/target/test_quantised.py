"""Targets with quantised weights: a head and an embedding that are no plain matrices, and FP8 in the files.

The library de-quantises FP8 and MXFP4 where there is no GPU; other formats keep layers of their own, which a small
8-bit layer stands for here.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_draft, tiny_model
from torch import nn

from fledge.data.tokenize import Sample
from fledge.decoding.generate import TreeShape, generate
from fledge.errors import UserError
from fledge.target.head import TargetEnds, TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.target.quantised import method_of


class Int8Linear(nn.Module):
    """A layer as quantisers leave it: packed numbers, no `weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Buffer(layer.weight.abs().amax(1, keepdim=True) / 127)
        self.packed = nn.Buffer((layer.weight / self.scale).round().to(torch.int8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.packed * self.scale).T


class Int8Embedding(Int8Linear):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed[ids] * self.scale[ids]


def quantised_target() -> Target:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.set_output_embeddings(Int8Linear(model.get_output_embeddings()))
    model.set_input_embeddings(Int8Embedding(model.get_input_embeddings()))
    return Target(model, tap_layers=(1, 2, 3), name="int8")


def test_head_and_embedding_are_made_once():
    target, plain = quantised_target(), Target(tiny_model("llama"), tap_layers=(1, 2, 3))
    head, embedding = target.head_weight, target.embedding_weight
    assert target.head_weight is head and target.embedding_weight is embedding
    assert target.vocab_size == plain.vocab_size and target.dtype == torch.float32
    for found, exact in ((head, plain.head_weight), (embedding, plain.embedding_weight)):
        error = (found - exact).abs().max() / exact.abs().max()
        assert 0 < error < 0.01, "near, and not the same: it is the quantised one"
    states = torch.randn(3, target.hidden_size)
    torch.testing.assert_close(states @ head.T, target.head(states))


def test_it_is_trained_for_and_decoded_with():
    target = quantised_target()
    record = LiveSource(target).record(Sample("one", torch.tensor(prompt(9)), torch.arange(9) > 3))
    rows = TargetHead.of(target).rows(torch.arange(8))
    assert record.summary is not None and rows is not None
    torch.testing.assert_close(rows(record.last_hidden), target.head(record.last_hidden)[:, :8])
    options = {"max_new_tokens": 8, "eos_token_ids": ()}
    drafted = generate(target, tiny_draft(target), prompt(9), tree=TreeShape(8, 3, 3), **options)
    assert drafted.token_ids == generate(target, None, prompt(9), **options).token_ids


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


def change_head(folder, make) -> torch.Tensor:
    """Store the head otherwise; returns what it was."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("lm_head.weight")
    save_file({**tensors, **make(weight)}, path, metadata={"format": "pt"})
    return weight


def of_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"lm_head.weight": (weight / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale": scale}


def of_all(weight):
    scale = weight.abs().max() / 448
    return {"lm_head.weight": (weight / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale": scale[None]}


def of_blocks(weight):
    scale = torch.full((1, 1), (weight.abs().max() / 448).item())
    return {"lm_head.weight": (weight / scale).to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": scale}


@pytest.mark.parametrize("make", [of_rows, of_all, of_blocks])
def test_an_fp8_head_is_multiplied_by_its_scales(folder, make):
    """Without them the numbers were taken as they lie: a head hundreds of times too large, without a word."""
    weight = change_head(folder, make)
    found = TargetEnds.from_files(str(folder)).head.weight
    assert found.dtype == torch.float32 and (found - weight).abs().max() < 0.05 * weight.abs().max()


@pytest.mark.parametrize("make, message", [
    (lambda weight: {"lm_head.weight": weight.to(torch.uint8)}, "lm_head.weight is stored as uint8, quantised"),
    (lambda weight: {"lm_head.weight": weight.to(torch.float8_e4m3fn)}, "lm_head.weight is stored as float8_e4m3fn"),
    (lambda weight: {"lm_head.qweight": weight.to(torch.int32)}, "its files hold no tensor 'lm_head.weight'"),
])  # fmt: skip
def test_other_heads_in_files_are_refused(folder, make, message):
    change_head(folder, make)
    with pytest.raises(UserError, match=message):
        TargetEnds.from_files(str(folder))


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "bitsandbytes", "no-such-method"])
def test_what_the_library_cannot_load_is_one_line(folder, method):
    """Where the format's package is installed, the checkpoint is none of it: an error as well."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    path.write_text(json.dumps({**config, "quantization_config": settings}))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64])
    from saved_target import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=rf"its weights are quantised \({method}\).*--target_backend vllm") as caught:
        Target.from_pretrained(str(folder), tap_layers=(1, 2, 3))
    assert "\n" not in str(caught.value)


def test_a_plain_target_names_no_method():
    assert method_of(tiny_model("llama").config) is None
