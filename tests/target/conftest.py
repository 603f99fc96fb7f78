"""A saved tiny target, conversations, and stores made from them by the command."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_target import save_target, write_conversations

from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings


@pytest.fixture(scope="session")
def saved_target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target") / "tiny-llama")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "talk.jsonl", 24)


@pytest.fixture(scope="session")
def extract_args(saved_target, conversations) -> Callable[..., ExtractSettings]:
    """Arguments for a store of several small shards."""

    def make(folder: Path, **changes) -> ExtractSettings:
        plain = {"target": str(saved_target), "data": [str(conversations)], "output_dir": folder,
                 "model_max_length": 120, "shard_mb": 0.25}  # fmt: skip
        return ExtractSettings(**{**plain, **changes})

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory, extract_args) -> Path:
    """A finished store; tests that change one work on a copy."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    extract(extract_args(folder))
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenised data goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Syncing is what makes small stores slow; what it protects from (power loss) no test here makes happen."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
