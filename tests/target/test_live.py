"""Batches of samples give the records of one at a time, whatever their lengths; every target of the table."""

import pytest
import torch
from odd_targets import odd_target
from tiny import NAMES, prompt, tiny_target

from fledge.data.tokenize import Sample
from fledge.errors import UserError
from fledge.extraction.extract import extract, open_target
from fledge.storage.states.reader import HiddenStore
from fledge.target import live
from fledge.target.live import BatchedSource, LiveSource, length_batches

LENGTHS = (3, 40, 17, 17, 5, 61, 1, 30)
TOLERANCE = 2e-5


def samples() -> list[Sample]:
    return [
        Sample(id=f"s{number}", input_ids=torch.tensor(prompt(length)), loss_mask=torch.arange(length) % 2 == 0)
        for number, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_batched_is_one_by_one(name):
    target, given = tiny_target(name), samples()
    alone = list(LiveSource(target).records(given))
    for batch_tokens in (64, 1000):
        together = list(BatchedSource(target, batch_tokens).records(given))
        assert [record.sample_id for record in together] == [sample.id for sample in given]
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.loss_mask, other.loss_mask)
            assert torch.equal(one.position_ids, other.position_ids)
            for states in ("tap_hidden", "last_hidden"):
                a, b = getattr(one, states), getattr(other, states)
                assert (a - b).abs().max() <= TOLERANCE * a.abs().max(), (name, states)


def batched_error(target) -> float:
    """Samples on both sides of a longrope's limit, in one batch budget, against one by one."""
    given = [Sample(str(n), torch.tensor(prompt(n)), torch.ones(n, dtype=torch.bool)) for n in (20, 40, 31, 33)]
    alone, together = LiveSource(target).records(given), BatchedSource(target, 1000).records(given)
    pairs = [(one.last_hidden, other.last_hidden) for one, other in zip(alone, together, strict=True)]
    return max(((one - other).abs().max() / one.abs().max()).item() for one, other in pairs)


def test_longrope_samples_meet_those_of_their_side_only(monkeypatch):
    """A batch takes its rope by its longest sample: a short one beside a long one was off by its own size."""
    target = odd_target("phi3_longrope")
    assert batched_error(target) < TOLERANCE
    monkeypatch.setattr(live, "longrope_limit", lambda rope: None)  # control
    assert batched_error(target) > 0.1


def test_padding_on_the_left_would_show():
    """Control: rows moved by padding are far from the records."""
    target, sample = tiny_target("llama"), samples()[2]
    alone = LiveSource(target).record(sample)
    moved = target.forward(torch.cat((torch.zeros(3, dtype=torch.int64), sample.input_ids))[None]).last_hidden[0, 3:]
    assert (alone.last_hidden - moved).abs().max() > 100 * TOLERANCE * alone.last_hidden.abs().max()


def test_batches_hold_similar_lengths_within_the_budget():
    lengths = [100, 7, 90, 95, 8, 300, 6, 50]
    batches = list(length_batches(lengths, 200))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 200
    assert batches[0] == [5] and len(batches) == 4  # alone; 100 and 95; 90 and 50; the short ones


def test_a_store_made_in_batches(extract_args, store, tmp_path):
    extract(extract_args(tmp_path / "batched", batch_tokens=512))
    ours, theirs = HiddenStore(store), HiddenStore(tmp_path / "batched")
    assert ours.ids == theirs.ids
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.last_hidden - other.last_hidden).abs().max() <= TOLERANCE * mine.last_hidden.abs().max()
    with pytest.raises(UserError, match="a server makes its own batches"):
        open_target(extract_args(tmp_path, batch_tokens=512, target_backend="vllm", server=["http://localhost:1"]))
    with pytest.raises(UserError, match="--batch-tokens -1"):
        open_target(extract_args(tmp_path, batch_tokens=-1))
