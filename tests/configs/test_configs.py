"""configs/: the generated files are what their table gives, and the table's targets are the models they claim to be.

The strongest check is the size: the model built from a row's fields, without weights, has the published number of
parameters, so a wrong layer count, MLP, vocabulary or tied head shows. Recipes differ only in their target and where
its data is; one of each kind is trained for a step on a tiny target of its architecture.
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from saved_target import save_target, write_conversations
from tiny_vlm import save_vlm

from fledge.commands.train import TrainArgs, parse_args
from fledge.drafters.eagle3.config import from_json
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.train.arguments import TrainSettings
from fledge.train.run import train

CONFIGS = Path(__file__).parents[2] / "configs"
sys.path.insert(0, str(CONFIGS))
make = importlib.import_module("make")
TARGETS = make.TARGETS
COMPLETE = [name for name, row in TARGETS.items() if not row.missing]

# What `derive` reads, the model class, and how a tiny one is made: (tests/tiny.py or tests/tiny_vlm.py, its row)
TINY = {
    "LlamaConfig": ("text", "llama"), "Qwen3Config": ("text", "qwen3"), "Qwen3MoeConfig": ("text", "qwen3_moe"),
    "Qwen2Config": ("text", "qwen2"), "HunYuanDenseV1Config": ("text", "hunyuan_v1_dense"),
    "HunYuanMoEV1Config": ("text", "hunyuan_v1_moe"), "GptOssConfig": ("text", "gpt_oss"),
    "Gemma3TextConfig": ("text", "gemma3"), "Gemma3Config": ("vision", "gemma3"),
    "Qwen2_5_VLConfig": ("vision", "qwen2_5_vl"), "Qwen3VLConfig": ("vision", "qwen3_vl"),
    "Qwen3VLMoeConfig": ("vision", "qwen3_vl_moe"), "Qwen3_5Config": ("vision", "qwen3_5"),
    "Qwen3_5MoeConfig": ("vision", "qwen3_5_moe"), "HunYuanVLConfig": ("vision", "hunyuan_vl"),
}  # fmt: skip


def test_the_files_are_what_the_table_gives():
    made = make.files()
    there = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.suffix in (".yaml", ".json")}
    assert there == set(made)
    stale = [path for path, text in made.items() if (CONFIGS / path).read_text(encoding="utf-8") != text]
    assert not stale, "run `python configs/make.py`"


def unknown_fields(row) -> list[str]:
    """Fields the config classes do not know: they would keep them, and read nothing of them.

    head_dim is read by every model, declared or not; a tied head is stated by the outer config of a vision model.
    """
    text = type(make.full_config(row).get_text_config())
    classes = (text, getattr(transformers, row.config_class))
    known = {field.name for known_class in classes for field in dataclasses.fields(known_class)}
    return [key for key in row.fields if key not in known | set(text.attribute_map) | {"head_dim"}]


@pytest.mark.parametrize("name", TARGETS)
def test_every_field_is_one_of_the_config_class(name):
    row = TARGETS[name]
    if row.missing:
        row = dataclasses.replace(row, fields={k: v for k, v in row.fields.items() if k not in row.missing})
    assert not unknown_fields(row)


def test_a_misspelt_field_is_noticed():
    row = TARGETS["qwen3-8b"]
    assert unknown_fields(dataclasses.replace(row, fields={**row.fields, "num_hiden_layers": 36})) == [
        "num_hiden_layers"
    ]


def language_parameters(row) -> float:
    """Billions of parameters of the language model transformers builds from the row, embedding once."""
    config = make.full_config(row)
    vision = config.get_text_config() is not config
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    count = sum(p.numel() for p in model.get_decoder().parameters())
    return (count + (0 if row.fields["tie_word_embeddings"] else model.get_output_embeddings().weight.numel())) / 1e9


@pytest.mark.parametrize("name", COMPLETE)
def test_the_model_has_the_published_size(name):
    row = TARGETS[name]
    assert language_parameters(row) == pytest.approx(row.params_b, rel=0.02)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 35}, {"intermediate_size": 11008}, {"tie_word_embeddings": True}]
)
def test_the_size_notices_a_wrong_row(change):
    row = TARGETS["qwen3-8b"]
    wrong = language_parameters(dataclasses.replace(row, fields={**row.fields, **change}))
    assert wrong != pytest.approx(row.params_b, rel=0.02)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_draft_config_is_read_back_as_derived(name):
    config = make.draft_config(TARGETS[name])
    assert from_json(CONFIGS / "draft" / f"{name}-eagle3.json") == config
    text = TARGETS[name].fields
    assert (
        config.head_dim * config.num_attention_heads
        == text.get("head_dim", config.head_dim) * text["num_attention_heads"]
    )
    assert config.max_position_embeddings == text["max_position_embeddings"]


# ---- recipes ---------------------------------------------------------------------------------------------------------

OWN = {"target", "data", "states", "output_dir", "model_max_length"}


def kind(name: str) -> tuple[str, bool]:
    row = TARGETS[name]
    return row.config_class, make.offline(row)


KINDS = sorted({kind(name) for name in TARGETS})


def parsed(name: str, *flags: str) -> TrainSettings:
    return parse_args(
        TrainArgs, ["--config", str(CONFIGS / f"{name}.yaml"), *flags], prog="fledge train", description=""
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipe_is_accepted_and_differs_only_in_its_target(name):
    args = parsed(name)
    first = next(other for other in TARGETS if kind(other) == kind(name))
    mine, other = ({k: v for k, v in yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()).items() if k not in OWN}
                   for n in (name, first))  # fmt: skip
    assert mine == other
    assert args.draft.ttt_steps == 7 and args.trainer.num_train_epochs == 10
    header = (CONFIGS / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "Expected tau:" in header and (TARGETS[name].missing or ("memory" in header and "hours" in header))


def test_an_unknown_key_of_a_recipe_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((CONFIGS / "qwen3-8b.yaml").read_text() + "ttt_step: 3\n")
    with pytest.raises(UserError, match="unknown key 'ttt_step'.*ttt_steps"):
        parse_args(TrainArgs, ["--config", str(path)], prog="fledge train", description="")


def tiny(config_class: str, folder: Path) -> Path:
    """A tiny target of this architecture, saved."""
    sort, row = TINY[config_class]
    layers: dict = {"num_hidden_layers": 8}
    if row in ("gemma3", "gpt_oss"):
        layers["layer_types"] = ["sliding_attention", "full_attention"] * 4
    if row.startswith("qwen3_5"):
        layers["layer_types"] = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
    return (save_target if sort == "text" else save_vlm)(folder, row, **layers)


@pytest.mark.parametrize(("config_class", "stored"), KINDS, ids=[f"{c}-{'stored' if s else 'live'}" for c, s in KINDS])
def test_the_recipe_trains_a_tiny_target(config_class, stored, tmp_path, capsys, monkeypatch):
    """As it stands but for the target, the paths, one step and a vocabulary of 64."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    name = next(name for name in TARGETS if kind(name) == (config_class, stored))
    target = tiny(config_class, tmp_path / "target")
    data = write_conversations(tmp_path / "data.jsonl", 60 if not stored else 4)
    flags = ["--output_dir", str(tmp_path / "head"), "--max_steps", "1", "--draft_vocab_size", "64",
             "--eval_strategy", "no", "--per_device_train_batch_size", "2", "--bf16", "False"]  # fmt: skip
    if stored:
        extract(ExtractSettings(target=str(target), data=[str(data)], output_dir=tmp_path / "states"))
        flags += ["--train_hidden_path", str(tmp_path / "states"), "--dataloader_num_workers", "0"]
    else:
        flags += ["--target_model_name_or_path", str(target), "--train_data_path", str(data)]
    train(parsed(name, *flags))
    head = json.loads((tmp_path / "head" / "config.json").read_text())
    assert head["draft_vocab_size"] == 64 and (tmp_path / "head" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "head" / "train_config.json").read_text())["ttt_steps"] == 7


def block_flags(name: str) -> list[str]:
    """The flags that the header of a recipe gives for a block draft, behind those of the recipe itself."""
    lines = [line.removeprefix("#").strip() for line in (CONFIGS / f"{name}.yaml").read_text().splitlines()]
    start = next(number for number, line in enumerate(lines) if "--draft-type dspark" in line)
    words = f"{lines[start].removesuffix(chr(92))} {lines[start + 1]}".split()
    assert words[:4] == ["fledge", "train", "--config", f"configs/{name}.yaml"]
    return words[4:]


@pytest.mark.parametrize("name", TARGETS)
def test_the_block_flags_of_a_recipe_are_accepted(name):
    args = parsed(name, *block_flags(name))
    assert (args.draft.draft_type, args.draft.draft_vocab_size) == ("dspark", 0)
    assert args.trainer.output_dir == f"outputs/{name}-dspark"
    assert ("DATA" in args.inputs.data) is not make.offline(TARGETS[name])


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen2.5-vl-7b"])
def test_a_recipe_trains_a_block_draft(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    target = tiny(TARGETS[name].config_class, tmp_path / "target")
    data = write_conversations(tmp_path / "data.jsonl", 60)
    train(parsed(
        name, *block_flags(name), "--target", str(target), "--data", str(data), "--output-dir", str(tmp_path / "draft"),
        "--max_steps", "1", "--eval_strategy", "no", "--per_device_train_batch_size", "2", "--bf16", "False",
        "--num-anchors", "4",
    ))  # fmt: skip
    head = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert head["architectures"] == ["Qwen3DSparkModel"] and head["draft_vocab_size"] == head["vocab_size"]
