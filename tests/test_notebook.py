"""docs/quickstart.ipynb: its cells run from top to bottom, on a tiny model instead of the one the first unpacks."""

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, commands

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def code_cells(path: Path) -> list[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def run_cell(cell: str, names: dict[str, Any], path: str) -> None:
    """A cell of Python, or one command behind `!`, as IPython runs them."""
    if not cell.startswith("!"):
        exec(compile(cell, "cell", "exec"), names)
        return
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", cell[1:]], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{cell}\n{done.stderr[-3000:]}"


@pytest.mark.timeout(600)
def test_the_notebook_runs(tiny_model_dir, tmp_path, monkeypatch, warm_path):
    first, *others = code_cells(NOTEBOOK)
    assert commands(first[1:])[0][:3] == ["fledge", "quickstart", "--prepare-only"]
    shutil.copytree(tiny_model_dir, tmp_path / "quickstart" / "target")
    rows = [{"id": f"p{n}", "messages": [{"role": "user", "content": f"say {n} words"}]} for n in range(12)]
    (tmp_path / "quickstart" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names: dict[str, Any] = {}
        for cell in others:
            run_cell(cell, names, warm_path)
    assert names["drafted"].token_ids == names["plain"].token_ids
    assert "tokens per pass of the target" in printed.getvalue() and "10 of 10 answers" not in printed.getvalue()
    assert "answers are identical to plain decoding" in printed.getvalue()


def test_a_cell_that_fails_is_noticed(warm_path):
    """Negative control."""
    with pytest.raises(AssertionError, match="invalid choice|no-such-command|unknown command"):
        run_cell("!fledge no-such-command", {}, warm_path)
    with pytest.raises(NameError):
        run_cell("print(nothing)", {}, warm_path)


def test_it_is_kept_without_outputs():
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
