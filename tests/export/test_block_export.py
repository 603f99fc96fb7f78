"""Block drafts to and from other programs' layouts: the way there and back is the identity, whoever wrote the file."""

import json
from pathlib import Path

import pytest
import torch
from block_reference import tiny_block
from safetensors.torch import load_file, save_file
from tiny import tiny_target

from fledge.drafters.dspark.checkpoint import read_block
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.errors import UserError
from fledge.export.convert import convert_head, export_head
from fledge.export.settings import ConvertSettings, ExportSettings

KINDS = [("dflash", {}), ("dspark", {}), ("dspark", {"sample_from_anchor": False, "causal": True, "sliding_window": 9})]


def saved(folder: Path, draft_type="dspark", draft_vocab_size=48, **overrides) -> Path:
    draft = tiny_block(tiny_target("llama"), draft_type, draft_vocab_size=draft_vocab_size, **overrides)
    save_draft(draft, folder, dtype=torch.float32)
    return folder


def export(head: Path, to, **settings) -> Path:
    folder = head.parent / f"out-{to}"
    export_head(ExportSettings(head=str(head), to=to, target="org/Tiny", output_dir=folder, **settings))
    return folder


def convert(head: Path) -> Path:
    folder = head.parent / "back"
    convert_head(ConvertSettings(head=str(head), output_dir=folder))
    return folder


@pytest.mark.parametrize("to", ["vllm", "sglang", "speculators"])
@pytest.mark.parametrize("draft_type, overrides", KINDS)
def test_there_and_back(draft_type, overrides, to, tmp_path, capsys):
    head = saved(tmp_path / "head", draft_type, None if to == "sglang" else 48, **overrides)
    before, out = read_block(head), export(head, to)
    after = read_block(convert(out))
    assert after.config == before.config or to == "speculators"  # which does not say how deep the target is
    for field in ("tap_layers", "sample_from_anchor", "causal", "sliding_window", "markov_rank", "mask_token_id"):
        assert getattr(after.config, field) == getattr(before.config, field), field
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    card = (out / "README.md").read_text()
    assert f"{'DSpark' if draft_type == 'dspark' else 'DFlash'} block draft for org/Tiny" in card
    drafts = before.config.num_drafts
    command = {"vllm": f'"method": "{draft_type}"', "sglang": f"--speculative-algorithm {draft_type.upper()}",
               "speculators": "vllm serve"}[to]  # fmt: skip
    assert command in card and (to != "vllm" or f'"num_speculative_tokens": {drafts}' in card)


def test_readers_are_told_both_conventions(tmp_path):
    """What vLLM#56792 was about: a field left out, and every token drafted one place off."""
    head = saved(tmp_path / "head")
    plain = json.loads((export(head, "vllm") / "config.json").read_text())
    inner = json.loads((export(head, "speculators") / "config.json").read_text())
    assert plain["sample_from_anchor"] is plain["dflash_config"]["sample_from_anchor"] is True
    assert inner["sample_from_anchor"] is True and "model_type" not in inner
    assert inner["aux_hidden_state_layer_ids"] == [layer + 1 for layer in plain["target_layer_ids"]]
    assert plain["architectures"] == ["Qwen3DSparkModel"]


def test_what_sglang_would_read_wrongly_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes the target's whole head.*--draft-vocab-size 0"):
        export(saved(tmp_path / "head"), "sglang")
    with pytest.raises(UserError, match="--to eagle: this draft has no such layout. Known: vllm, sglang, speculators"):
        export(saved(tmp_path / "head"), "eagle")


def rewritten(folder: Path, change) -> Path:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    del document["fledge"]
    path.write_text(json.dumps(change(document)))
    return folder


def without(*names: str):
    def change(document: dict) -> dict:
        for name in names:
            document.pop(name, None)
            document["dflash_config"].pop(name, None)
        return document

    return change


def test_what_a_file_leaves_unsaid_is_its_trainers(tmp_path):
    """DFlash files that do not say mean slots at their own places, DSpark files drafts from the anchor."""
    for draft_type, from_anchor in (("dflash", False), ("dspark", True)):
        head = rewritten(saved(tmp_path / draft_type, draft_type), without("sample_from_anchor"))
        found = convert(head)
        assert read_block(found).config.sample_from_anchor is from_anchor
        assert json.loads((found / "config.json").read_text())["sample_from_anchor"] is from_anchor
        (found / "convert.json").unlink()
        for path in found.iterdir():
            path.unlink()
        found.rmdir()


def test_files_may_bring_the_targets_ends(tmp_path, capsys):
    """A whole vocabulary's head and embedding are the target's; a prefix of training checkpoints is taken off."""
    head = rewritten(saved(tmp_path / "head", "dflash", None), without())
    tensors = {f"model.{name}": tensor for name, tensor in load_file(head / WEIGHTS).items()}
    ends = {"lm_head.weight": torch.zeros(128, 64), "embed_tokens.weight": torch.zeros(128, 64)}
    before = read_block(saved(tmp_path / "same", "dflash", None))
    save_file(tensors | ends, head / WEIGHTS)
    after = read_block(convert(head))
    assert after.tensors.keys() == before.tensors.keys()
    assert "left out are embed_tokens.weight, lm_head.weight" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_expressed_is_refused(tmp_path):
    gated = rewritten(saved(tmp_path / "head"), lambda document: {**document, "markov_head_type": "gated"})
    with pytest.raises(UserError, match="markov_head_type='gated'; fledge has the vanilla one"):
        convert(gated)
