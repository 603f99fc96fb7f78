"""A head that trained a token embedding of its own (a few published ones did) drafts with it; it once got the target's,
without a word."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_draft, tiny_model, tiny_target

from fledge.drafters.eagle3.checkpoint import WEIGHTS, load_draft, save_draft
from fledge.drafters.eagle3.head import EMBEDDING
from fledge.errors import UserError
from fledge.export.convert import convert_head, export_head
from fledge.export.settings import ConvertSettings, ExportSettings


@pytest.fixture
def target():
    return tiny_target("llama")


def head_with(folder, embedding):
    """A saved head whose file brings this embedding."""
    save_draft(tiny_draft(tiny_target("llama")), folder, dtype=torch.float32)
    save_file(load_file(folder / WEIGHTS) | {EMBEDDING: embedding}, folder / WEIGHTS)
    return folder


def test_it_is_read_kept_and_written(tmp_path, target):
    own = torch.randn(128, 64, generator=torch.Generator().manual_seed(3))
    draft = load_draft(head_with(tmp_path / "head", own), target.embedding_weight)
    assert torch.equal(draft.embed(torch.arange(128)), own)
    save_draft(draft, tmp_path / "again", dtype=torch.float32)
    assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[EMBEDDING], own)


def test_a_copy_of_the_targets_is_the_targets(tmp_path, target):
    copy = target.embedding_weight.detach().bfloat16()
    draft = load_draft(head_with(tmp_path / "head", copy), target.embedding_weight)
    assert draft.embedding.data_ptr() == target.embedding_weight.data_ptr()
    save_draft(draft, tmp_path / "again")
    assert EMBEDDING not in load_file(tmp_path / "again" / WEIGHTS)


@pytest.mark.parametrize("own", [True, False])
def test_convert_leaves_out_copies_only(tmp_path, target, own, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "target")
    embedding = target.embedding_weight.detach() + own
    head = head_with(tmp_path / "head", embedding)
    convert_head(ConvertSettings(head=str(head), output_dir=tmp_path / "out", target=str(tmp_path / "target")))
    assert (EMBEDDING in load_file(tmp_path / "out" / WEIGHTS)) == own
    assert ("a token embedding of its own, which is kept" in " ".join(capsys.readouterr().err.split())) == own


def test_sglang_would_replace_it(tmp_path):
    head = head_with(tmp_path / "head", torch.zeros(128, 64))
    with pytest.raises(UserError, match="an embedding of its own .* which the reader of the sglang layout ignores"):
        export_head(ExportSettings(head=str(head), to="sglang", output_dir=tmp_path / "out"))
    export_head(ExportSettings(head=str(head), to="vllm", output_dir=tmp_path / "vllm"))
    assert EMBEDDING in load_file(tmp_path / "vllm" / WEIGHTS)


def test_one_of_another_size_is_refused(tmp_path, target):
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(128, 32\)"):
        load_draft(head_with(tmp_path / "head", torch.zeros(128, 32)), target.embedding_weight)
