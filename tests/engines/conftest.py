"""Tests against real engines run only when asked for (`make test-engines`, or `-m vllm`): each starts a server.

The heads they serve are trained here, on the real target's own answers, and kept in pytest's cache: a fresh machine
pays for them once. FLEDGE_TEST_HEAD, FLEDGE_TEST_HEAD_31, FLEDGE_TEST_HEAD_DEEP and FLEDGE_TEST_BLOCK name finished
ones to use instead.
"""

import os
import shutil
from pathlib import Path

import pytest
from vllm_chains import UNROLLED, answers_of, run

HEADS = {  # name: a variable with a finished one, and flags
    "eagle3": ("FLEDGE_TEST_HEAD", ("--draft_type", "eagle3", *UNROLLED)),
    "eagle3.1": ("FLEDGE_TEST_HEAD_31", ("--draft_type", "eagle3.1", *UNROLLED)),
    "two layers": ("FLEDGE_TEST_HEAD_DEEP", ("--draft_type", "eagle3.1", "--draft_layers", "2", *UNROLLED)),
}
BLOCKS = (
    "--draft_type", "dflash", "--draft_layers", "2", "--block_size", "8", "--num_anchors", "32", "--num_train_epochs",
    "12",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "vllm" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="needs a vLLM server: run `make test-engines`"))


@pytest.fixture(scope="session")
def vllm_program() -> str:
    """The vllm command of an environment of its own; FLEDGE_VLLM names another one."""
    beside = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"
    program = os.environ.get("FLEDGE_VLLM") or str(beside)
    if not shutil.which(program):
        pytest.skip(f"no vLLM at {program}: run tests/engines/setup_vllm.sh or set FLEDGE_VLLM")
    return program


@pytest.fixture(scope="session")
def trained_heads(request, smollm2_dir) -> dict[str, Path]:
    """EAGLE-3 and EAGLE-3.1 heads for the real target, one of two layers; two minutes each, once."""
    cache = Path(request.config.cache.mkdir("engine-heads"))
    return {name: _head(name, cache, str(smollm2_dir), *about) for name, about in HEADS.items()}


@pytest.fixture(scope="session")
def trained_block(request, smollm2_dir) -> Path:
    """A DFlash draft of blocks of eight for the real target; a few minutes, once."""
    return _head(
        "dflash", Path(request.config.cache.mkdir("engine-heads")), str(smollm2_dir), "FLEDGE_TEST_BLOCK", BLOCKS
    )


def _head(name: str, cache: Path, target: str, variable: str, flags: tuple[str, ...]) -> Path:
    if given := os.environ.get(variable):
        return Path(given)
    folder = cache / name.replace(" ", "-")
    if not (folder / "provenance.json").is_file():  # written last
        answers = answers_of(cache, target)
        run(
            "train", "--target_model_name_or_path", target, "--train_data_path", str(answers),
            "--train_hidden_path", str(cache / ("states-dflash" if name == "dflash" else "states")),
            "--output_dir", str(folder), *flags,
            "--draft_vocab_size", "4096", "--model_max_length", "192", "--per_device_train_batch_size", "2",
            "--logging_steps", "20", "--save_strategy", "no", "--disable_tqdm", "True",
        )  # fmt: skip
    return folder
