"""EAGLE-3 heads of several layers: decoded, written and read, grown out of a head of one layer.

Their loss, gradients and unrolling: test_ttt.py; their compiled step: test_fused_step.py; their memory: test_plan.py.
"""

import json

import pytest
import torch
from round_trip import there_and_back
from safetensors.torch import load_file, save_file
from saved_target import save_target, write_conversations
from tiny import prompt, tiny_draft, tiny_target

from fledge.cli import run_command
from fledge.decoding.generate import generate, generate_batch
from fledge.decoding.records import Sampling
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.config import from_json
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.export.convert import convert_head, export_head
from fledge.export.engines import ENGINES, check_servable
from fledge.export.servable import check_draft
from fledge.export.settings import ConvertSettings, ExportSettings
from fledge.target.record import TargetRecord
from fledge.train.warm_start import continue_from

LAYERS, TREE = 3, TreeShape(12, 3, 3)
PROMPTS = [prompt(6), prompt(9), prompt(3)]


def deep_draft(layers: int = LAYERS) -> DraftModel:
    return tiny_draft(tiny_target("llama"), seed=3, num_layers=layers)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_text_is_the_targets(options):
    target, prompts = tiny_target("llama"), PROMPTS
    settings = {"max_new_tokens": 12, "eos_token_ids": (), "sampling": Sampling(**options)}
    for one in prompts:
        plain = generate(target, None, one, **settings).token_ids
        assert generate(target, deep_draft(), one, tree=TREE, **settings).token_ids == plain


def test_batches_draft_what_each_alone_would():
    target, prompts = tiny_target("llama"), PROMPTS
    settings = {"max_new_tokens": 12, "eos_token_ids": (), "tree": TREE}
    alone = [generate(target, deep_draft(), one, **settings) for one in prompts]
    together = generate_batch(target, deep_draft(), prompts, **settings)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids and one.accepted == other.accepted


@pytest.mark.parametrize("layout", ["vllm", "speculators", "eagle", "sglang"])
def test_there_and_back(layout, tmp_path):
    out = there_and_back(deep_draft(), layout, tmp_path)
    document = json.loads((out / "config.json").read_text())
    layer = document if layout != "speculators" else document["transformer_layer_config"]
    assert layer["num_hidden_layers"] == LAYERS
    assert {name.split(".")[1] for name in load_file(out / WEIGHTS) if name.startswith("layers.")} >= {"1", "2"}
    if layout != "sglang":
        check_draft(str(out), "T", 3)


def test_llama_cpp_is_not_given_what_it_does_not_read(tmp_path):
    to = {"to": "llama.cpp", "output_dir": tmp_path / "out"}
    save_draft(deep_draft(), tmp_path / "head", dtype=torch.float32)
    with pytest.raises(UserError, match=r"3 decoder layers \(one is read\), which the reader of the llama.cpp"):
        export_head(ExportSettings(head=str(tmp_path / "head"), **to))
    save_draft(deep_draft(layers=1), tmp_path / "one", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "one"), **to))


@pytest.mark.parametrize("engine, other, passed_over", [
    ("vllm", "sglang", "layers.1.hidden_norm.weight"), ("sglang", "vllm", "layers.1.input_layernorm.weight"),
])  # fmt: skip
def test_each_engine_has_a_name_for_the_norm_of_further_layers(engine, other, passed_over, tmp_path):
    """A file of the other engine would load, and draft with norms that were never set."""
    save_draft(deep_draft(), tmp_path / "head", dtype=torch.float32)
    for layout in (engine, other):
        export_head(ExportSettings(head=str(tmp_path / "head"), to=layout, output_dir=tmp_path / layout))
    assert passed_over in load_file(tmp_path / other / WEIGHTS)
    check_servable(tmp_path / engine, ENGINES[engine])
    with pytest.raises(UserError, match=f"{passed_over} is passed over"):
        check_servable(tmp_path / other, ENGINES[engine])


def test_a_file_with_both_names_is_not_guessed_at(tmp_path):
    save_draft(deep_draft(), tmp_path / "head", dtype=torch.float32)
    tensors = load_file(tmp_path / "head" / WEIGHTS)
    tensors["layers.1.hidden_norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "head" / WEIGHTS)
    with pytest.raises(UserError, match=r"layers.1.hidden_norm.weight and layers.1.input_layernorm.weight are both"):
        convert_head(ConvertSettings(head=str(tmp_path / "head"), output_dir=tmp_path / "back"))


def test_a_layer_that_is_missing_or_too_many_is_named(tmp_path):
    save_draft(deep_draft(), tmp_path / "head", dtype=torch.float32)
    tensors = load_file(tmp_path / "head" / WEIGHTS)
    document = json.loads((tmp_path / "head" / "config.json").read_text())
    save_file({name: one for name, one in tensors.items() if "layers.2" not in name}, tmp_path / "head" / WEIGHTS)
    with pytest.raises(UserError, match=r"layers\.2\."):
        convert_head(ConvertSettings(head=str(tmp_path / "head"), output_dir=tmp_path / "back"))
    save_file(tensors, tmp_path / "head" / WEIGHTS)
    (tmp_path / "head" / "config.json").write_text(json.dumps({**document, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"layers\.2\."):
        convert_head(ConvertSettings(head=str(tmp_path / "head"), output_dir=tmp_path / "back"))


def test_a_head_of_one_layer_grows_without_a_step_back(tmp_path):
    """A new layer begins by giving on what it gets, so the first losses are the shallow head's; training moves it."""
    target, shallow, deep = tiny_target("llama"), tiny_draft(tiny_target("llama")), deep_draft()
    deep.set_vocab(shallow.d2t, shallow.t2d)
    save_draft(shallow, tmp_path / "head", dtype=torch.float32)
    continue_from(deep, tmp_path / "head", target.head_weight, 8, list)
    ids = torch.tensor(prompt(14))
    output = target.forward(ids[None])
    record = TargetRecord(
        sample_id="r", input_ids=ids, loss_mask=torch.arange(14) >= 4, position_ids=torch.arange(14),
        tap_hidden=output.tap_hidden[0], last_hidden=output.last_hidden[0],
    )  # fmt: skip
    batch = pack([record])
    states = [torch.stack(unroll(draft, batch, align(batch, 3), 3)) for draft in (shallow, deep)]
    torch.testing.assert_close(*states)
    deep.requires_grad_(True)
    torch.stack(unroll(deep, batch, align(batch, 3), 3)).pow(3).sum().backward()
    assert deep.layer(2).mlp.down_proj.weight.grad.abs().sum() > 0


def test_the_command_trains_them_and_stays_with_what_it_began(tmp_path, capsys):
    save_target(tmp_path / "target")
    write_conversations(tmp_path / "data.jsonl", 24, seed=1)
    words = [
        "--target", str(tmp_path / "target"), "--data", str(tmp_path / "data.jsonl"), "--output-dir",
        str(tmp_path / "head"), "--draft-vocab-size", "48", "--model-max-length", "64", "--max-steps", "4",
    ]  # fmt: skip
    assert run_command("train", [*words, "--draft-layers", "2"]) == 0
    config = from_json(tmp_path / "head" / "config.json")
    assert config.num_layers == 2
    capsys.readouterr()
    assert run_command("train", [*words, "--max-steps", "6"]) != 0  # one layer is another run
    assert "draft_layers" in capsys.readouterr().err
    assert run_command("train", [*words, "--max-steps", "6", "--draft-layers", "2"]) == 0
