"""The store: what is read is what the target said; runs stopped, shared or extended leave the same bytes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_target import equal_records, tree_bytes, write_conversations

from fledge.errors import UserError
from fledge.extraction.extract import Samples, extract, fill, open_target
from fledge.storage.states.plan import Plan, PlannedSample, cut
from fledge.storage.states.reader import HiddenStore
from fledge.storage.states.writer import Ranks


@pytest.fixture(scope="module")
def opened(extract_args, tmp_path_factory):
    args = extract_args(tmp_path_factory.mktemp("unused"))
    target = open_target(args)
    return target, Samples.read(args, target.template)


def test_stored_equals_live(store, opened):
    target, samples = opened
    stored = HiddenStore(store)
    assert len(stored) == len(samples.ids) == 24 and len(stored.shards) > 3
    assert all(equal_records(a, b) for a, b in zip(stored, target.producer.records(samples), strict=True))
    backwards = list(target.producer.records(reversed(list(samples))))  # a record depends on its sample alone
    assert all(equal_records(a, b) for a, b in zip(stored, reversed(backwards), strict=True))


def test_counts_and_head_are_the_target_s(store, opened):
    target, samples = opened
    stored = HiddenStore(store)
    expected = torch.zeros(stored.identity.vocab_size, dtype=torch.int64)
    for sample in samples:
        expected += torch.bincount(sample.input_ids[sample.loss_mask], minlength=len(expected))
    assert torch.equal(stored.counts(), expected)
    some = [3, 17, 5]
    assert torch.equal(
        stored.counts(some), sum(torch.bincount(s.input_ids[s.loss_mask], minlength=len(expected))
                                 for i, s in enumerate(samples) if i in some),
    )  # fmt: skip
    hidden = torch.randn(5, stored.identity.hidden_size)
    head = stored.head(torch.device("cpu"))
    assert torch.equal(head(hidden), target.producer.target.head(hidden))
    assert torch.equal(head.embedding, target.head.embedding)


def test_ranks_leave_the_bytes_of_one_process(store, opened, tmp_path):
    target, samples = opened
    for rank in range(3):
        manifest = fill(
            tmp_path / "shared", target.identity, target.head, target.producer, samples, shard_bytes=2**18,
            ranks=Ranks(rank, 3),
        )  # fmt: skip
        assert manifest.complete == (rank == 2)
    assert tree_bytes(tmp_path / "shared") == tree_bytes(store)


def test_killed_anywhere_and_continued(launch, store, saved_target, conversations, tmp_path):
    """SIGKILL at 25 random moments; every time the store opens, and what is left at the end is the same bytes."""
    script = Path(__file__).parents[1] / "killed_extraction.py"
    done = launch([script, saved_target, conversations, tmp_path, 25])
    stores = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 25 and stores
    reference = tree_bytes(store)
    for folder in stores:
        HiddenStore(folder).verify()
        assert tree_bytes(folder) == reference


def test_more_data_is_appended(opened, extract_args, tmp_path):
    target, samples = opened
    folder = tmp_path / "grown"
    extract(extract_args(folder, max_samples=9))
    before = {name: content for name, content in tree_bytes(folder).items() if name.startswith("shard")}
    extract(extract_args(folder))
    after = tree_bytes(folder)
    assert all(after[name] == content for name, content in before.items())
    stored = HiddenStore(folder)
    assert stored.ids == samples.ids
    assert all(equal_records(a, b) for a, b in zip(stored, target.producer.records(samples), strict=True))
    assert torch.equal(stored.counts(), stored.counts(range(len(stored) - 1)) + stored.counts([len(stored) - 1]))


def test_more_data_is_appended_under_a_relative_path(store, saved_target, extract_args, tmp_path, monkeypatch):
    """The target's path is relative this time; it was refused as another target."""
    folder = tmp_path / "grown"
    extract(extract_args(folder, max_samples=9))
    monkeypatch.chdir(saved_target.parent)
    extract(extract_args(folder, target=saved_target.name))
    stored = HiddenStore(folder)
    stored.verify()
    assert stored.ids == HiddenStore(store).ids and stored.manifest.complete


def test_same_id_with_other_tokens_is_refused(store, extract_args, tmp_path):
    folder = shutil.copytree(store, tmp_path / "copy")
    other = write_conversations(tmp_path / "other.jsonl", 24, seed=9)
    with pytest.raises(UserError, match="holds this id with other tokens"):
        extract(extract_args(folder, data=[str(other)]))
    twice = [str(other), str(shutil.copy(other, tmp_path / "again.jsonl"))]
    with pytest.raises(UserError, match="appears twice"):
        extract(extract_args(tmp_path / "twice", data=twice))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"dtype": "bfloat16"}, 'dtype "float32", not "bfloat16"'), ({"chat_template_type": "chatml"}, "template"),
     ({"tap_layers": [1, 2, 3]}, "tap_layers"), ({"model_max_length": 60}, "max_length 120, not 60"),
     ({"tap_storage": "fp8"}, "tap_storage")],
)  # fmt: skip
def test_other_settings_do_not_mix(store, extract_args, tmp_path, change, says):
    folder = shutil.copytree(store, tmp_path / "copy")
    before = tree_bytes(folder)
    with pytest.raises(UserError, match=says) as raised:
        extract(extract_args(folder, **change))
    assert "another --output-dir" in str(raised.value) and tree_bytes(folder) == before


def test_smaller_storage(opened, extract_args, tmp_path, store):
    """fp8 taps come back within an fp8 step of the row's largest; supervised rows of last_hidden exactly."""
    folder = tmp_path / "small"
    extract(extract_args(folder, tap_storage="fp8", last_storage="supervised"))
    small, whole = HiddenStore(folder), HiddenStore(store)
    small.verify()
    for record in whole:
        row = whole.ids.index(record.sample_id)
        other = small[row]
        mask = record.loss_mask
        assert torch.equal(other.last_hidden[mask], record.last_hidden[mask])
        assert not other.last_hidden[~mask].any() and record.last_hidden[~mask].any()
        error = (other.tap_hidden - record.tap_hidden).abs()
        assert (
            error <= record.tap_hidden.abs() / 16 + record.tap_hidden.abs().amax(-1, keepdim=True) / 448 / 512
        ).all()
        assert error.max() > 0
    assert small.manifest.document()["counts"]["bytes"] < 0.6 * whole.manifest.document()["counts"]["bytes"]


def test_records_are_cut_to_a_length(store):
    record, cut_record = HiddenStore(store)[0], HiddenStore(store, max_length=20)[0]
    assert len(cut_record) == 20 < len(record)
    assert torch.equal(cut_record.tap_hidden, record.tap_hidden[:20])


def test_a_plan_keeps_order_and_size():
    samples = [PlannedSample(str(i), length, 1, 0) for i, length in enumerate([5, 5, 4, 30, 1, 1])]
    shards = cut(samples, 10, first=7)
    assert [[s.length for s in shard.samples] for shard in shards] == [[5, 5], [4], [30], [1, 1]]
    assert [shard.number for shard in shards] == [7, 8, 9, 10]


def test_a_second_writer_is_refused(opened, tmp_path, extract_args):
    target, samples = opened
    from fledge.storage.states.writer import StoreWriter

    with StoreWriter(tmp_path, target.identity, target.head, samples, shard_bytes=2**18):
        with pytest.raises(UserError, match="another run is writing there"):
            extract(extract_args(tmp_path))


def test_plan_survives_its_file(store, tmp_path):
    plan = Plan.read(store)
    plan.write(tmp_path)
    assert Plan.read(tmp_path).sha256 == plan.sha256
    (tmp_path / "plan.jsonl").write_text("{")
    with pytest.raises(UserError, match="plan.jsonl:1: not valid JSON"):
        Plan.read(tmp_path)


def test_a_lost_shard_is_made_again(store, opened, tmp_path):
    """Delete a shard and its seal: the next run makes it anew, byte for byte. Delete only the shard: it says so."""
    target, samples = opened
    folder = shutil.copytree(store, tmp_path / "copy")
    (folder / "shard-00002.safetensors").unlink()
    again = (folder, target.identity, target.head, target.producer, samples)
    with pytest.raises(UserError, match="to have it made again"):
        fill(*again, shard_bytes=2**18)
    (folder / "sealed" / "shard-00002.json").unlink()
    (folder / "manifest.json").unlink()
    (folder / "target_head.safetensors").unlink()
    fill(*again, shard_bytes=2**18)
    assert tree_bytes(folder) == tree_bytes(store)


def test_infinite_states_are_refused(opened, tmp_path):
    target, samples = opened

    class Broken:
        def records(self, wanted):
            for record in target.producer.records(wanted):
                yield dataclasses.replace(record, last_hidden=record.last_hidden * float("inf"))

    with pytest.raises(UserError, match="NaN or infinity"):
        fill(tmp_path, target.identity, target.head, Broken(), samples, shard_bytes=2**18)


def test_ray_workers_leave_the_bytes_of_one_process(store, extract_args, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=80_000_000)
    try:
        extract(extract_args(tmp_path / "shared", num_workers=2, num_gpus_per_model=0))
    finally:
        ray.shutdown()
    assert tree_bytes(tmp_path / "shared") == tree_bytes(store)
