"""A target cut over two processes writes the store that one process writes."""

from pathlib import Path

import pytest
import torch
from launching import torchrun

from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.storage.states.reader import HiddenStore

TOLERANCE = 1e-5  # fp32, sums joined in another order


def words(saved_target: Path, conversations: Path, out: Path) -> list:
    return [
        "extract", "--model-name", saved_target, "--dataset-path", conversations, "--output-dir", out,
        "--model-max-length", 120, "--shard-mb", 0.25, "--tp-plan", "auto",
    ]  # fmt: skip


def test_a_cut_target_gives_the_same_states(launch, saved_target, conversations, store, tmp_path):
    launch(words(saved_target, conversations, tmp_path / "cut"), ranks=2)
    ours, theirs = HiddenStore(store), HiddenStore(tmp_path / "cut")
    assert ours.ids == theirs.ids and not theirs.identity.differences(ours.identity)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("tap_hidden", "last_hidden"):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max(), name
    head, cut = (one.head(torch.device("cpu")) for one in (ours, theirs))
    assert torch.equal(head.weight, cut.weight)  # whole, not one process's part


def test_a_failure_of_the_first_ends_both(saved_target, tmp_path):
    finished = torchrun(["-m", "fledge", *words(saved_target, tmp_path / "absent.jsonl", tmp_path / "cut")], ranks=2)
    assert finished.returncode != 0 and "absent.jsonl" in finished.stderr


def test_flags_that_do_not_fit(extract_args, tmp_path):
    with pytest.raises(UserError, match="torchrun --nproc-per-node"):
        extract(extract_args(tmp_path, tp_plan="auto"))
