"""docs/python.md runs as it stands, beside a tiny target and a head for it."""

from pathlib import Path

import pytest
import torch
from pages import ROOT, python_blocks, run_python
from tiny import tiny_draft

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.target.model import Target

PAGE = ROOT / "docs" / "python.md"


@pytest.fixture
def beside(tiny_model_dir, tmp_path, monkeypatch) -> Path:
    """The working directory of a page: a target and a head in it."""
    (tmp_path / "target").symlink_to(tiny_model_dir)
    target = Target.from_pretrained(str(tiny_model_dir))
    save_draft(tiny_draft(target, draft_vocab_size=None), tmp_path / "head", dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(beside, capsys):
    names = run_python(PAGE)
    printed = capsys.readouterr().out
    assert "tokens per forward" in printed and "num_beams=4" in printed
    assert len(names["answers"]) == 2 and len(python_blocks(PAGE)) > 5


def test_a_block_that_fails_would_be_noticed(tmp_path):
    """Negative control."""
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run_python(page)
