"""Imports go left to right, stage by stage, with a rim below."""

import ast
from pathlib import Path

STAGES = ("data", "target", "draft", "drafters", "decoding", "train", "export", "bench")
RIM = {
    "config", "errors", "escaping", "console", "outputs", "parsing", "provenance", "ranges", "redaction", "servers",
    "workers",
}  # fmt: skip
PACKAGE = Path(__file__).parent.parent / "fledge"


def imports_of(path: Path) -> set[str]:
    """Top-level fledge modules a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fledge" else [f"fledge.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fledge.")}
    return found


def wrong_imports(path: Path, stage: str) -> set[str]:
    allowed = RIM | set(STAGES[: STAGES.index(stage) + 1])
    return imports_of(path) - allowed


def test_stages_import_only_from_their_left():
    wrong = {}
    for stage in STAGES:
        for path in (PACKAGE / stage).rglob("*.py"):
            if found := wrong_imports(path, stage):
                wrong[str(path.relative_to(PACKAGE))] = found
    assert not wrong


def test_rim_imports_no_stage():
    for name in RIM:
        files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
        for file in files:
            assert imports_of(file) <= RIM | {"__version__"}, file


def test_the_check_finds_a_wrong_import(tmp_path):
    """Negative control."""
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from fledge.bench.run import bench\n    return bench\n")
    assert wrong_imports(bad, "data") == {"bench"}
