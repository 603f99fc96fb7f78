"""Imports go left to right, stage by stage, with a rim below; no module imports itself in a circle."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

STAGES = (
    "data", "target", "storage", "servers", "extraction", "drafters", "decoding", "api", "regeneration", "train",
    "export", "bench", "doctor", "commands",
)  # fmt: skip
RIM = {
    "errors", "escaping", "console", "http_client", "offline", "outputs", "parsing", "provenance", "ranges",
    "redaction", "workers",
}  # fmt: skip
PACKAGE = Path(__file__).parent.parent / "fledge"


def imports_of(path: Path) -> set[str]:
    """Full names of the fledge modules a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.startswith("fledge.")}


def parts_of(path: Path) -> set[str]:
    """The stages and rim modules a file imports."""
    return {name.split(".")[1] for name in imports_of(path)}


def wrong_imports(path: Path, stage: str) -> set[str]:
    allowed = RIM | set(STAGES[: STAGES.index(stage) + 1])
    if stage == "commands":
        allowed.add("cli")  # quickstart runs the other commands
    return parts_of(path) - allowed


def test_stages_import_only_from_their_left():
    wrong = {}
    for stage in STAGES:
        for path in (PACKAGE / stage).rglob("*.py"):
            if found := wrong_imports(path, stage):
                wrong[str(path.relative_to(PACKAGE))] = found
    assert not wrong


def test_rim_imports_no_stage():
    for name in RIM:
        assert parts_of(PACKAGE / f"{name}.py") <= RIM | {"__version__"}


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """One path per module that leads back to it."""
    for start in graph:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop()
            for module in graph[path[-1]] & graph.keys():
                if module == start:
                    yield [*path, start]
                    paths.clear()
                    break
                if module not in seen:
                    seen.add(module)
                    paths.append([*path, module])


def import_graph(package: Path) -> dict[str, set[str]]:
    modules = {
        "fledge." + ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    return {name: imports_of(path) & modules.keys() for name, path in modules.items()}


def test_no_circles():
    assert not list(circles(import_graph(PACKAGE)))


def test_the_checks_find_a_wrong_import_and_a_circle(tmp_path):
    """Negative control."""
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from fledge.bench.run import bench\n    return bench\n")
    assert wrong_imports(bad, "data") == {"bench"}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text("import fledge.bad\n")
    assert list(circles(import_graph(tmp_path)))


def class_names(path: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]


def test_a_class_name_stands_for_one_class():
    counts = Counter(name for path in PACKAGE.rglob("*.py") for name in class_names(path))
    assert len(counts) > 200 and {name for name, times in counts.items() if times > 1} == set()
