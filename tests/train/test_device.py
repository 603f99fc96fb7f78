"""What training and extraction ask of a GPU, counted on an emulated one: a step waits for nothing but its log line."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from block_reference import tiny_block
from emulated_device import CUDA, EmulatedDevice
from tiny import tiny_config, tiny_model, tiny_vocab
from tiny_trainer import samples
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import TrainerCallback

from fledge.drafters.dspark.loss import BlockLossSettings
from fledge.drafters.dspark.training import BlockModule
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.loss import LossSettings
from fledge.errors import UserError
from fledge.storage.states.plan import PlannedSample, PlannedShard
from fledge.storage.states.shard import ShardBuffer
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainerArguments
from fledge.train.module import TTTModule
from fledge.train.records import as_it_is
from fledge.train.trainer import DraftTrainer

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
STEPS = 3


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(TrainerArguments, "device", property(lambda self: (self._setup_devices, CUDA)[1]))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: CUDA))
    with EmulatedDevice() as emulated:
        yield emulated


def target_on(device: EmulatedDevice) -> Target:
    return Target(device.put(tiny_model("qwen3").bfloat16()), tap_layers=(1, 2, 3), name="qwen3")


def trainer_on(
    device: EmulatedDevice, folder, source: str = "stored", *, ttt_steps: int = STEPS, survival: float = 0.8, **more
) -> DraftTrainer:
    target = target_on(device)
    draft = DraftModel(tiny_config(target), torch.zeros(target.vocab_size, target.hidden_size))
    draft.set_vocab(*tiny_vocab(target.vocab_size, draft.config.draft_vocab_size))
    draft = device.put(draft.bfloat16())
    draft.bind_embedding(target.embedding_weight)
    args = arguments(folder, **more)
    module = TTTModule(
        draft, target.head, ttt_steps, LossSettings(), TargetHead.of(target).rows, survival=survival, seed=3
    )  # fmt: skip
    live = LiveSource(target).record
    if source == "live":
        return DraftTrainer(module, args, to_record=live, train_dataset=samples(16))
    return DraftTrainer(module, args, to_record=as_it_is, train_dataset=[on_host(live(one)) for one in samples(16)])


def arguments(folder, **more) -> TrainerArguments:
    return TrainerArguments(
        **{"output_dir": str(folder), "learning_rate": 1e-3, "per_device_train_batch_size": 2, "bf16": False,
           "save_strategy": "no", "disable_tqdm": True, "seed": 3, **more}
    )  # fmt: skip


def on_host(record: TargetRecord) -> TargetRecord:
    return record.to(torch.device("cpu"))


class Watch(TrainerCallback):
    """What the device was asked in each optimisation step after the first."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device
        self.steps: list[tuple[list[str], int, Counter]] = []

    def on_step_begin(self, *args, **more):  # noqa: D102
        self.device.forget()

    def on_step_end(self, args, state, control, **more):  # noqa: D102
        device = self.device
        if state.global_step > 1:  # the first makes the optimizer's state
            self.steps.append(([*device.reads, *device.waits], device.launches, Counter(device.operations)))


def watched(trainer: DraftTrainer, device: EmulatedDevice) -> Watch:
    watch = Watch(device)
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.steps) == trainer.state.max_steps - 1
    return watch


@pytest.mark.parametrize("source", ["stored", "live"])
@pytest.mark.parametrize("optim", ["same", "muon"])
def test_a_step_waits_for_nothing(source, optim, device, tmp_path):
    trainer = trainer_on(device, tmp_path, source, max_steps=3, logging_steps=100, matrix_optim=optim)
    for asked, *_ in watched(trainer, device).steps:
        assert not asked


@pytest.mark.parametrize("draft_type", ["dflash", "dspark"])
def test_a_step_of_a_block_draft_waits_for_nothing(draft_type, device, tmp_path):
    target = target_on(device)
    draft = device.put(tiny_block(target, draft_type).requires_grad_().bfloat16())
    module = BlockModule(draft, target.head, BlockLossSettings(), TargetHead.of(target).rows, num_anchors=4, seed=3)
    trainer = DraftTrainer(
        module, arguments(tmp_path, max_steps=3, logging_steps=100), to_record=LiveSource(target).record,
        train_dataset=samples(16),
    )  # fmt: skip
    for asked, *_ in watched(trainer, device).steps:
        assert not asked


def test_loaders_pin_states(device, monkeypatch):
    """PyTorch's loaders pin what says how; a record does, so that its copies to a GPU wait for nobody."""
    record = on_host(LiveSource(target_on(device)).record(samples(1)[0]))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(len(self)), self)[1])
    (made,) = pin_memory([record])
    assert isinstance(made, TargetRecord) and pinned == [len(record)] * 6, "four tensors, two of the summary"


def test_launches_of_a_step(device, tmp_path):
    """Stated maxima. Neither the number of documents nor that of pieces of random depths is among what they depend on:
    attention is one call per TTT step."""
    counts = {}
    for batch, ttt_steps, survival in ((2, 3, 0.8), (2, 4, 0.8), (8, 3, 0.8), (8, 3, 1.0)):
        trainer = trainer_on(
            device, tmp_path, ttt_steps=ttt_steps, survival=survival, per_device_train_batch_size=batch, max_steps=2,
            logging_steps=100, matrix_optim="same",
        )  # fmt: skip
        ((_, launches, operations),) = watched(trainer, device).steps
        assert operations["_flash_attention_forward"] == operations["_flash_attention_backward"] == ttt_steps
        counts[batch, ttt_steps, survival] = launches
    assert counts[2, 3, 0.8] == counts[8, 3, 0.8] == counts[8, 3, 1.0] <= 814
    assert counts[2, 4, 0.8] - counts[2, 3, 0.8] <= 266, "launches of one more TTT step"


def test_a_log_line_is_where_a_step_waits(device, tmp_path):
    """A control: reads are seen. The loss, the metrics, the gradient's norm, whether a loss was no number."""
    trainer = trainer_on(device, tmp_path, max_steps=2, logging_steps=1)
    watch = Watch(device)
    trainer.add_callback(watch)
    trainer.train()
    device.forget()
    trainer.log({"loss": 1.0})
    assert 0 < len(device.reads) <= 4


def test_a_planted_read_is_counted(device, tmp_path, monkeypatch):
    real = TTTModule.forward

    def reading(self, batch, *args, **more):
        output = real(self, batch, *args, **more)
        output.loss.item()
        return output

    monkeypatch.setattr(TTTModule, "forward", reading)
    trainer = trainer_on(device, tmp_path, max_steps=2, logging_steps=100)
    asked = watched(trainer, device).steps[0][0]
    assert len(asked) == 1 and asked[0].startswith("item at")


def test_a_loss_that_is_no_number_is_remembered(device, tmp_path):
    """Nobody waits to see it, and no log line or checkpoint comes after it."""
    trainer = trainer_on(device, tmp_path, max_steps=4, logging_steps=3, save_strategy="steps", save_steps=2)
    calls = []

    def poisoned(record):
        calls.append(record)
        return replace(record, tap_hidden=record.tap_hidden * float("nan")) if len(calls) in (3, 4) else record

    trainer.to_record = poisoned
    with pytest.raises(UserError, match="loss became nan at step 2"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not trainer.state.log_history


def test_an_extracted_sample_waits_for_nothing(device, tmp_path):
    target, data = target_on(device), samples(3)
    planned = [PlannedSample(one.id, len(one.input_ids), int(one.loss_mask.sum()), 0) for one in data]
    for taps, last in (("fp8", "supervised"), ("full", "all")):
        identity: Any = SimpleNamespace(
            tap_layers=target.tap_layers, hidden_size=target.hidden_size, dtype="bfloat16", tap_storage=taps,
            last_storage=last,
        )  # fmt: skip
        buffer = ShardBuffer(PlannedShard(0, tuple(planned)), identity)
        device.forget()
        for sample in data:
            buffer.put(LiveSource(target).record(sample))
        assert not device.reads and not device.waits and buffer.full
