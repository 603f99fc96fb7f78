"""The engines' own sources, read and not imported: installed, or where tests/engines/setup_*.sh puts them."""

import importlib.util
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ReadSource = Callable[[str], str]


@pytest.fixture(scope="session")
def sglang_source() -> ReadSource:
    """Text of a file of SGLang by its path in the package; FLEDGE_SGLANG names a wheel."""
    return _of_wheel("sglang", "FLEDGE_SGLANG") or _of_folders("sglang", [])


@pytest.fixture(scope="session")
def vllm_source() -> ReadSource:
    """Text of a file of vLLM by its path in the package; FLEDGE_VLLM_WHEEL names a wheel."""
    return _of_wheel("vllm", "FLEDGE_VLLM_WHEEL") or _of_folders("vllm", sorted(ROOT.glob(".venv-vllm/lib/*/*/vllm")))


def _of_wheel(package: str, variable: str) -> ReadSource | None:
    given = os.environ.get(variable)
    wheels = [Path(given)] if given else sorted(ROOT.glob(f".engines/{package}-*.whl"))
    return (lambda path: zipfile.ZipFile(wheels[-1]).read(f"{package}/{path}").decode()) if wheels else None


def _of_folders(package: str, folders: list[Path]) -> ReadSource:
    if (found := importlib.util.find_spec(package)) and found.origin:
        folders = [Path(found.origin).parent]
    if not folders:
        pytest.skip(f"no source of {package}: tests/engines/setup_sources.sh fetches its wheel")
    return lambda path: (folders[-1] / path).read_text(encoding="utf-8")
