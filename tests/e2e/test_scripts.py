"""The documented scripts on a tiny saved target: variables from the environment, flags passed on, exit codes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from saved_target import save_target, write_conversations
from tiny_vlm import save_vlm, write_image_conversations

from fledge.storage.states.reader import HiddenStore

SCRIPTS = Path(__file__).parents[2] / "scripts" / "speculative"
SHORT = ("--max_steps", "2", "--ttt_steps", "2", "--draft_vocab_size", "64", "--save_strategy", "no")


@pytest.fixture(scope="module", autouse=True)
def started_at_once(warm_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", warm_path)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work with a space")
    save_target(folder / "target")
    write_conversations(folder / "data.jsonl", 12)
    return folder


def run_script(work: Path, name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "FLEDGE_CACHE": str(work / "cache"), "CUDA_VISIBLE_DEVICES": "", "NPROC_PER_NODE": "1", **variables,
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *flags], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )


def test_hidden_states_then_offline_training(work):
    """Two ranks extract; training reads what they left. Empty optional variables are left out."""
    made = run_script(
        work, "generate_hidden_for_draft_model.sh", "--shard-mb", "0.25", DATASET_PATH="data.jsonl",
        MODEL_NAME="target", OUTPUT_DIR="store", NPROC_PER_NODE="2", CHAT_TEMPLATE_TYPE="",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    stored = HiddenStore(work / "store")
    assert len(stored) == 12 and len(stored.shards) > 2
    trained = run_script(
        work, "train_eagle3_offline.sh", *SHORT, TRAIN_HIDDEN_PATH="store", OUTPUT_DIR="offline", RUN_NAME="tiny",
        LM_HEAD_KEY="lm_head.weight", EVAL_HIDDEN_PATH="store", MODEL_MAX_LENGTH="128", NUM_WORKERS="1",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert json.loads((work / "offline" / "provenance.json").read_text())["metrics"]["eval_tau"] >= 1
    assert (work / "offline" / "model.safetensors").is_file()
    config = json.loads((work / "offline" / "train_config.json").read_text())
    assert config["run_name"] == "tiny" and config["model_max_length"] == 128
    refused = run_script(work, "train_eagle3_offline.sh", TRAIN_HIDDEN_PATH="nothing", OUTPUT_DIR="no")
    assert refused.returncode == 1 and "nothing: no manifest.json" in refused.stderr


@pytest.mark.parametrize(("variables", "split"), [
    ({}, ["--split", "train_sft"]), ({"SPLIT": "test_sft"}, ["--split", "test_sft"]),
    ({"DATA_NAME_OR_PATH": "own/data"}, []),
])  # fmt: skip
def test_the_default_data_set_is_read_from_a_split_that_it_has(tmp_path, variables, split):
    """ultrachat_200k has no split named train, so the script without variables ended with the hub's error."""
    shown = tmp_path / "python3"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    words = run_script(
        tmp_path, "generate_data_for_target_model.sh", PATH=f"{tmp_path}:{os.environ['PATH']}", **variables
    )
    words = words.stdout.split()
    assert (words[words.index("--split") :][:2] if "--split" in words else []) == split


def test_online_training(work):
    trained = run_script(
        work, "train_eagle3_online.sh", *SHORT, TARGET_MODEL_NAME_OR_PATH="target", TRAIN_DATA_PATH="data.jsonl",
        EVAL_DATA_PATH="", DRAFT_MODEL_CONFIG_PATH="", OUTPUT_DIR="online", MODEL_MAX_LENGTH="128",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (work / "online" / "model.safetensors").is_file()


def test_the_scripts_for_pictures(tmp_path_factory):
    """The same scripts behind other names: pictures to hidden states, to a head; and a head trained live."""
    work = tmp_path_factory.mktemp("pictures with a space")
    save_vlm(work / "target", "qwen2_5_vl")
    write_image_conversations(work / "data.jsonl", 6)
    pixels = {"MAX_PIXELS": "512", "MIN_PIXELS": "64"}
    made = run_script(
        work, "generate_vlm_hidden_for_draft_model.sh", "--tap-layers", "1", "2", "3", DATASET_PATH="data.jsonl",
        MODEL_NAME="target", OUTPUT_DIR="store", NUM_PROC="1", **pixels,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    assert len(HiddenStore(work / "store")) == 6
    offline = run_script(
        work, "train_eagle3_vlm_offline.sh", *SHORT, TRAIN_HIDDEN_PATH="store", OUTPUT_DIR="offline", NUM_WORKERS="1"
    )
    assert offline.returncode == 0, offline.stderr[-3000:]
    online = run_script(
        work, "train_eagle3_vlm_online.sh", *SHORT, "--tap_layers", "1", "2", "3", TARGET_MODEL_NAME_OR_PATH="target",
        TRAIN_DATA_PATH="data.jsonl", OUTPUT_DIR="online", NUM_WORKERS="1", **pixels,
    )  # fmt: skip
    assert online.returncode == 0, online.stderr[-3000:]
    first, second = (json.loads((work / name / "config.json").read_text()) for name in ("offline", "online"))
    assert first["rope_parameters"] == second["rope_parameters"]
    assert first["rope_parameters"]["mrope_section"] == [2, 3, 3]
