"""`fledge serve --draft`: every layout vLLM accepts reaches it, a wrong one never gets that far."""

import json

import pytest
import torch
from block_reference import tiny_block
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_model, tiny_target

from fledge.cli import run_command
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.servable import check_draft
from fledge.export.settings import ExportSettings


@pytest.fixture
def folders(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "target")
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    for layout in ("vllm", "sglang", "speculators"):
        export_head(ExportSettings(head=str(tmp_path / "head"), to=layout, output_dir=tmp_path / layout, target="T"))
    return tmp_path


def serve(folders, head: str, *flags: str) -> int:
    return run_command("serve", ["--model-name-or-path", str(folders / "target"), "--draft", head, "--print",
                                 "--num-servers", "1", "--gpus", "", *flags])  # fmt: skip


@pytest.mark.parametrize("layout", ["head", "vllm", "speculators"])
def test_what_vllm_reads_is_served(folders, layout, capsys):
    """Our own checkpoint is vLLM's layout already."""
    assert serve(folders, str(folders / layout), "--num-speculative-tokens", "5") == 0
    line = capsys.readouterr().out
    given = json.loads(line[line.index("{") : line.index("}") + 1])
    assert given == {"method": "eagle3", "model": str(folders / layout), "num_speculative_tokens": 5}


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
@pytest.mark.parametrize("draft_type", ["dflash", "dspark"])
def test_block_drafts_are_served(folders, layout, draft_type, capsys):
    """They were refused as no EAGLE-3 head, or would have been started as one."""
    draft = tiny_block(tiny_target("llama"), draft_type, draft_vocab_size=None)
    save_draft(draft, folders / "block", dtype=torch.float32)
    export_head(ExportSettings(head=str(folders / "block"), to=layout, output_dir=folders / "out", target="T"))
    assert serve(folders, str(folders / "out"), "--num-speculative-tokens", "5") == 0
    line = capsys.readouterr().out
    given = json.loads(line[line.index("{") : line.index("}") + 1])
    assert given == {"method": draft_type, "model": str(folders / "out"), "num_speculative_tokens": 5}
    assert serve(folders, str(folders / "out"), "--num-speculative-tokens", "7") == 1
    assert f"more than the {draft.config.num_drafts} drafts of its block" in capsys.readouterr().err


def test_block_drafts_that_vllm_would_misread(folders):
    """vLLM fills in the slots of every DFlash draft: one that drafts from its anchor would be read one token off."""
    wrong = tiny_block(tiny_target("llama"), "dflash", draft_vocab_size=None, sample_from_anchor=True)
    save_draft(wrong, folders / "block", dtype=torch.float32)
    with pytest.raises(UserError, match="this one drafts from its anchor"):
        check_draft(str(folders / "block"), str(folders / "target"), 3)
    for to in ("vllm", "speculators", "sglang"):
        with pytest.raises(UserError, match="reads the slots of a DFlash draft at their own places"):
            export_head(ExportSettings(head=str(folders / "block"), to=to, output_dir=folders / "out", target="T"))
    tiny_model("llama", vocab_size=256).config.save_pretrained(folders / "other")
    right = tiny_block(tiny_target("llama"), "dflash", draft_vocab_size=None)
    save_draft(right, folders / "right", dtype=torch.float32)
    with pytest.raises(UserError, match="vocab_size is 128, the target's 256"):
        check_draft(str(folders / "right"), str(folders / "other"), 3)


def test_temperature_on_a_cpu_is_warned_of(folders, capsys):
    """vLLM 0.32's CPU build answered nonsense at T = 1 with a head; found while measuring one."""
    assert serve(folders, str(folders / "vllm")) == 0
    assert "nonsense above temperature 0" in capsys.readouterr().err
    assert serve(folders, str(folders / "vllm"), "--gpus", "0") == 0
    assert "nonsense" not in capsys.readouterr().err


def test_what_it_would_misread_is_not(folders, capsys):
    assert serve(folders, str(folders / "sglang")) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "name layer outputs, vLLM reads them as inputs" in printed.err
    tensors = load_file(folders / "vllm" / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folders / "vllm" / WEIGHTS)
    assert serve(folders, str(folders / "vllm")) == 1
    assert "lm_head.weight missing; it runs without" in capsys.readouterr().err


def test_another_targets_head(folders):
    tiny_model("llama", vocab_size=256).config.save_pretrained(folders / "other")
    with pytest.raises(UserError, match="vocab_size is 128, the target's 256"):
        check_draft(str(folders / "vllm"), str(folders / "other"), 3)
    check_draft(str(folders / "vllm"), "some/hub-name", 3)  # nothing to compare with here


def test_names_that_are_no_folder(folders, capsys):
    check_draft("some/head", "T", 3)
    assert "not checked here" in capsys.readouterr().err
    for wrong in (str(folders / "nowhere"), "nowhere"):
        with pytest.raises(UserError, match="no such folder, and no hub name"):
            check_draft(wrong, "T", 3)
