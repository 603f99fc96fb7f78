"""--sequence-parallel: who gets which samples, and what is refused. Its steps are in test_processes.py."""

import pytest

from fledge.errors import UserError
from fledge.train.arguments import TrainerArguments
from fledge.train.kinds import KINDS
from fledge.train.settings import DraftSettings
from fledge.train.shared_batches import SharedOrder, share_of_process


def test_every_process_of_a_group_gets_every_sample():
    order = SharedOrder(5, 2, seed=1)
    first = list(order)
    assert first[::2] == first[1::2] and sorted(first[::2]) == list(range(5)) and len(order) == 10
    order.set_epoch(1)
    assert list(order) != first and list(SharedOrder(3, 2, None)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("changes, message", [
    ({}, "--sequence-parallel 2 needs a multiple of so many processes, and there are 1"),
    ({"world": 4, "per_device_train_batch_size": 2}, "--per_device_train_batch_size 2: with --sequence-parallel"),
    ({"world": 4, "per_device_eval_batch_size": 8}, "--per_device_eval_batch_size 8: with --sequence-parallel"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, message, tmp_path, monkeypatch):
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, **changes}
    monkeypatch.setattr(TrainerArguments, "world_size", sizes.pop("world", 1))
    args = TrainerArguments(output_dir=str(tmp_path), use_cpu=True, **sizes)
    with pytest.raises(UserError, match=message):
        share_of_process(args, 2)
    assert share_of_process(args, 1) is None


def test_a_share_is_the_place_in_its_group(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerArguments, "world_size", 4)
    monkeypatch.setattr(TrainerArguments, "process_index", 3)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    share = share_of_process(TrainerArguments(output_dir=str(tmp_path), use_cpu=True, **sizes), 2)
    assert share is not None and (share.index, share.count) == (1, 2)


def test_block_drafts_are_refused():
    for kind, draft_type in ((KINDS["eagle3"], "eagle3"), (KINDS["dflash"], "dflash")):
        settings = DraftSettings(draft_type=draft_type, sequence_parallel=2)
        if draft_type == "eagle3":
            kind.check(settings)
            continue
        with pytest.raises(UserError, match="--sequence-parallel 2: only EAGLE-3 heads are trained so"):
            kind.check(settings)
