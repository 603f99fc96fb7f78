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
    if (found := importlib.util.find_spec("sglang")) and found.origin:
        folder = Path(found.origin).parent
        return lambda path: (folder / path).read_text(encoding="utf-8")
    wheels = [os.environ["FLEDGE_SGLANG"]] if "FLEDGE_SGLANG" in os.environ else sorted(ROOT.glob(".sglang/*.whl"))
    if not wheels:
        pytest.skip("no SGLang: tests/engines/setup_sglang.sh fetches its wheel, FLEDGE_SGLANG names one")
    return lambda path: zipfile.ZipFile(wheels[-1]).read(f"sglang/{path}").decode()


@pytest.fixture(scope="session")
def vllm_source() -> ReadSource:
    """Text of a file of vLLM by its path in the package."""
    found = importlib.util.find_spec("vllm")
    places = [Path(found.origin).parent] if found and found.origin else sorted(ROOT.glob(".venv-vllm/lib/*/*/vllm"))
    if not places:
        pytest.skip("no vLLM: tests/engines/setup_vllm.sh makes an environment with it")
    return lambda path: (places[-1] / path).read_text(encoding="utf-8")
