"""The Trainer around our loss: complete heads, exact resume, right averaging, clean stops. A tiny target, in fp32."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_target
from tiny_trainer import STEPS, losses, make_trainer, samples
from transformers import TrainingArguments

from fledge.data.tokenize import Sample
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.head import read_tensors
from fledge.errors import UserError
from fledge.outputs import mark
from fledge.train.resume import TRAIN, check_same_run, find_checkpoint


def test_the_final_head_is_complete_and_loss_falls(tmp_path):
    data = samples(4) * 10
    trainer = make_trainer(tmp_path, data, max_steps=20, save_strategy="no", eval_data=samples(4))
    trainer.train()
    trainer.save_model()
    assert sum(losses(trainer)[-3:]) < 0.9 * sum(losses(trainer)[:3])
    loaded = load_draft(tmp_path, tiny_target("qwen3").embedding_weight)
    trained = dict(trainer.draft.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    entry = trainer.state.log_history[0]
    wanted = {"loss", "tau", "coverage", "tokens_per_s", "cross_entropy_0", *(f"acc_{k}" for k in range(STEPS))}
    assert wanted <= set(entry)
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] >= 1 and 0 < metrics["eval_overlap_0"] < 1


def test_resumed_equals_uninterrupted(tmp_path):
    """Stopped after step 4 of 6 (a torn checkpoint lies there, too) and continued: the same losses and weights."""
    data = samples(16)
    whole = make_trainer(tmp_path / "whole", data)
    whole.train()
    part = make_trainer(tmp_path / "part", data)
    part.train()
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    torn = tmp_path / "part" / "checkpoint-5"
    torn.mkdir()
    mark(torn, TRAIN, "")
    (torn / "trainer_state.json").write_text('{"half": ')
    checkpoint = find_checkpoint(tmp_path / "part", "auto")
    assert checkpoint is not None and checkpoint.endswith("checkpoint-4")
    again = make_trainer(tmp_path / "part", data)
    again.train(resume_from_checkpoint=checkpoint)
    assert losses(again)[-2:] == losses(whole)[-2:]
    ends = [read_tensors(tmp_path / which / "checkpoint-6" / "model.safetensors") for which in ("whole", "part")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_accumulation_equals_a_larger_batch(tmp_path, average):
    """Batches of unequal sequences: a mean of means would differ, and so does this test's control."""
    data = samples(8)
    run = {"max_steps": 2, "save_strategy": "no", "average": average, "warmup_steps": 0, "matrix_optim": "same"}
    large = make_trainer(tmp_path, data, per_device_train_batch_size=4, **run)
    large.train()
    small = make_trainer(tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=4, **run)
    small.train()
    torch.testing.assert_close(losses(small), losses(large), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(small.draft.parameters(), large.draft.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    other = make_trainer(tmp_path, data[1:] + data[:1], per_device_train_batch_size=3, **run)
    other.train()
    assert abs(losses(other)[0] - losses(large)[0]) > 1e-4


def test_nan_loss_stops_with_the_checkpoint_intact(tmp_path):
    trainer = make_trainer(tmp_path, samples(16))
    honest, calls = trainer.to_record, []

    def poisoned(sample):
        record = honest(sample)
        calls.append(sample.id)
        if len(calls) > 6:
            record.tap_hidden.fill_(float("nan"))
        return record

    trainer.to_record = poisoned
    with pytest.raises(UserError, match="loss became nan at step 4.*resume"):
        trainer.train()
    assert find_checkpoint(tmp_path, "auto") == str(tmp_path / "checkpoint-2")
    tensors = read_tensors(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_untrainable_samples_do_not_stop_a_batch(tmp_path):
    """A sample whose only supervised token is its last teaches nothing; beside others it changes nothing."""
    empty = Sample("empty", torch.arange(4, 12), torch.arange(8) == 7)
    trainer = make_trainer(tmp_path, [empty, *samples(3)], max_steps=2, save_strategy="no")
    trainer.train()
    assert all(torch.tensor(losses(trainer)).isfinite())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_without_a_trainable_sample_reaches_every_parameter(tmp_path, recompute):
    """Alone in a batch of one it stopped the run (a reshape of nothing); DDP ranks would wait for its gradients."""
    empty = Sample("empty", torch.arange(4, 12), torch.arange(8) == 7)
    trainer = make_trainer(tmp_path, [empty], max_steps=1, save_strategy="no")
    module = trainer.model
    module.recompute = recompute
    module(trainer._prepare_inputs([empty])).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    check_same_run(tmp_path, {"learning_rate": 1e-3, "num_train_epochs": 2}, resuming=False)
    check_same_run(tmp_path, {"learning_rate": 1e-3, "num_train_epochs": 3}, resuming=True)
    with pytest.raises(UserError, match="learning_rate=0.001, this one 0.01"):
        check_same_run(tmp_path, {"learning_rate": 1e-2, "num_train_epochs": 3}, resuming=True)
    assert json.loads((tmp_path / "train_config.json").read_text())["learning_rate"] == 1e-3


def test_a_run_is_the_same_under_a_relative_path(tmp_path, monkeypatch):
    """A rerun of the same command with a relative path was refused as another run."""
    for name in ("answers", "others"):
        (tmp_path / name).mkdir()
    check_same_run(tmp_path, {"data": [str(tmp_path / "answers")]}, resuming=False)
    monkeypatch.chdir(tmp_path)
    check_same_run(tmp_path, {"data": ["answers"]}, resuming=True)
    with pytest.raises(UserError, match=r"data=\['answers'\], this one \['others'\]"):
        check_same_run(tmp_path, {"data": ["others"]}, resuming=True)


def test_a_finished_run_takes_no_more_steps(tmp_path):
    """The Trainer by itself would take one more step at every further start."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    data = samples(6)
    first = make_trainer(tmp_path, data, **saving)
    first.train()
    again = make_trainer(tmp_path, data, **saving)
    again.train(resume_from_checkpoint=find_checkpoint(tmp_path, "auto"))
    assert again.state.global_step == 4 and losses(again) == losses(first)
    weights, expected = again.gathered_weights(), first.gathered_weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_resume_from_a_folder_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint there"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "False") is None


@pytest.mark.parametrize("flag", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_is_honoured_and_changes_nothing(tmp_path, flag):
    run = {"max_steps": 2, "save_strategy": "no"}
    plain = make_trainer(tmp_path, samples(8), **run)
    plain.train()
    if flag == "gradient_checkpointing":  # the library's old name for it; 5.17 knows no other
        known = hasattr(TrainingArguments, "activation_checkpointing")
        with pytest.warns(FutureWarning) if known else nullcontext():
            spared = make_trainer(tmp_path, samples(8), **run, gradient_checkpointing=True)
    else:
        spared = make_trainer(tmp_path, samples(8), **run, activation_checkpointing=True)
    spared.train()
    assert spared.accelerator.unwrap_model(spared.model).recompute and not plain.model.recompute
    assert losses(spared) == losses(plain)
    with pytest.raises(UserError, match="not offloaded"):
        plain.model.activation_checkpointing_enable(offload=True)


def test_a_bad_sample_is_named_and_the_checkpoint_is_intact(tmp_path):
    data = samples(16)
    broken = Sample("broken", torch.tensor([5, 6, 10_000_000, 7, 8, 9]), torch.ones(6, dtype=torch.bool))
    trainer = make_trainer(tmp_path, [*data, *[broken] * 4], max_steps=10)
    with pytest.raises(UserError, match="sample 'broken' cannot be trained on.*resumes from the last checkpoint"):
        trainer.train()
    if trainer.state.global_step >= 2:
        assert find_checkpoint(tmp_path, "auto") is not None


def test_a_failing_save_removes_its_rest_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """Like a disk that fills up at the second checkpoint, while the optimizer is written."""
    trainer, honest, calls = make_trainer(tmp_path, samples(16)), torch.save, []

    def full(thing, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        return honest(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="checkpoint-4: the checkpoint could not be written.*make room"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()
    monkeypatch.undo()
    again = make_trainer(tmp_path, samples(16))
    again.train(resume_from_checkpoint=find_checkpoint(tmp_path, "auto"))
    whole = make_trainer(tmp_path / "whole", samples(16))
    whole.train()
    assert losses(again) == losses(whole)
