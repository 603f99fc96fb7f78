"""fledge plan: its memory against what autograd holds, its counts against the data, its limits against themselves."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from saved_target import save_target, write_conversations
from tiny import tiny_target

from fledge import cli
from fledge.commands.plan import PlanArgs, count, estimate, longest_that_fits, target_size
from fledge.console import print_document
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.loss import LossSettings
from fledge.drafters.sequence_share import Share
from fledge.errors import UserError
from fledge.target.record import TargetRecord
from fledge.train.memory import num_parameters, step_memory
from fledge.train.module import TTTModule
from fledge.train.muon import MuonWithAuxiliary, split_parameters

STEPS, ROWS = 5, 160
CONFIG = DraftConfig(
    hidden_size=96, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=300,
    draft_vocab_size=120, tap_layers=(1, 2, 3), rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def held_bytes(
    *, bf16: bool, recompute: bool = False, share: Share | None = None, layers: int = 1, prompt: int = 0
) -> int:
    """What autograd keeps between forward and backward of the unrolled draft, each storage once."""
    torch.manual_seed(0)
    draft = DraftModel(replace(CONFIG, num_layers=layers), torch.randn(300, 96))
    record = TargetRecord(
        sample_id="r", input_ids=torch.randint(300, (ROWS,)), loss_mask=torch.arange(ROWS) >= prompt,
        position_ids=torch.arange(ROWS), tap_hidden=torch.randn(ROWS, 3, 96), last_hidden=torch.randn(ROWS, 96),
    )  # fmt: skip
    batch = pack([record])
    own = {parameter.untyped_storage().data_ptr() for parameter in draft.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            alignment = align(batch, STEPS, share=share)
            states = torch.stack(unroll(draft, batch, alignment, STEPS, recompute=recompute))
    return sum(sizes.values()) + states.nbytes


@pytest.mark.parametrize("prompt", [0, 100])
def test_activations_of_several_layers(prompt):
    """All layers but the last unroll the prompt's rows too, once."""
    config = replace(CONFIG, num_layers=3)
    planned = step_memory(config, rows=ROWS, active_rows=ROWS - prompt, ttt_steps=STEPS, bf16=False, device_type="cpu")
    assert planned.activations == pytest.approx(held_bytes(bf16=False, layers=3, prompt=prompt), rel=0.15)
    assert planned.activations != pytest.approx(held_bytes(bf16=False, layers=1, prompt=prompt), rel=0.5)
    draft = DraftModel(config, torch.zeros(300, 96))
    assert sum(num_parameters(config).values()) == sum(parameter.numel() for parameter in draft.parameters())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(bf16):
    planned = step_memory(CONFIG, rows=ROWS, ttt_steps=STEPS, bf16=bf16, device_type="cpu").activations
    assert planned == pytest.approx(held_bytes(bf16=bf16, recompute=False), rel=0.15)
    assert planned != pytest.approx(held_bytes(bf16=bf16, recompute=True), rel=0.15)  # control: another way to train


def test_activations_of_a_sequence_that_two_processes_share():
    """Every process has its rows' part, and the step-0 keys and values of all rows."""
    planned = step_memory(CONFIG, rows=ROWS, active_rows=ROWS // 2, ttt_steps=STEPS, bf16=False, device_type="cpu")
    assert planned.activations == pytest.approx(held_bytes(bf16=False, share=Share(0, 2)), rel=0.15)
    assert planned.activations < 0.7 * held_bytes(bf16=False)


def test_parameters_are_counted_by_part():
    draft = DraftModel(CONFIG, torch.zeros(300, 96))
    assert sum(num_parameters(CONFIG).values()) == sum(parameter.numel() for parameter in draft.parameters())
    module = TTTModule(draft, lambda hidden: hidden, STEPS, LossSettings())
    assert sum(4 * p.numel() for p in module.parameters()) == step_memory(CONFIG, rows=8).weights


def test_targets_are_counted_without_weights():
    for name in ("llama", "qwen3_moe"):
        target = tiny_target(name)
        size = target_size(target.config)
        assert size.parameters == sum(parameter.numel() for parameter in target.model.parameters())
        assert (size.active < size.parameters) == (name == "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_target(folder / "target")
    write_conversations(folder / "data.jsonl", 60, seed=1)
    return folder


def test_tokens_are_scaled_from_a_sample(folder):
    plain = {"target": str(folder / "target"), "data": [str(folder / "data.jsonl")]}
    whole, part = count(PlanArgs(**plain, sample=60)), count(PlanArgs(**plain, sample=20))
    assert whole.conversations == part.conversations == 60
    assert part.tokens == pytest.approx(whole.tokens, rel=0.15) and part.tokens != whole.tokens


def test_the_command_says_what_does_not_fit(folder, capsys):
    words = ["plan", "--target-model-name-or-path", str(folder / "target"), "--data", str(folder / "data.jsonl"),
             "--hardware", "cpu", "--gpu-memory-gb", "0.05", "--tflops", "0.2", "--draft-vocab-size", "64"]  # fmt: skip
    assert cli.run_command(words[0], words[1:]) == 0
    document = json.loads(capsys.readouterr().out)
    assert any("needs" in message and "per_device_train_batch_size" in message for message in document["warnings"])
    run = document["run"]
    assert run["hours_online"] >= run["hours_offline"] >= 0
    assert 0 < run["longest_sequence_online"] <= run["longest_sequence_offline"]
    roomy = [*words[1:], "--gpu-memory-gb", "64"]
    assert cli.run_command(words[0], roomy) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []
    assert cli.run_command(words[0], [*roomy, "--depth-survival", "1.5"]) != 0
    assert "--depth-survival is 1.5; it must be" in capsys.readouterr().err


def test_the_table_is_for_people(folder, capsys):
    """It was full of 0.00, 0.0 and powers of ten."""
    words = ["--target", str(folder / "target"), "--num-tokens", "1000000", "--draft-vocab-size", "64"]
    for name in ("h20", "B200", "a100_80"):
        assert cli.run_command("plan", [*words, "--hardware", name]) == 0
    said = capsys.readouterr().err
    assert not re.search(r"\b0\.0+\b|None|null|e\+", said)
    assert "1,000,000" in said and "time online" in said and " 1 s " in said


def test_no_document_is_printed_on_a_terminal(monkeypatch, capsys):
    print_document({"a": 1})
    assert capsys.readouterr().out == '{"a": 1}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_document({"a": 1})
    assert capsys.readouterr().out == ""


def test_the_longest_sequence_is_the_longest():
    assert longest_that_fits(lambda rows: 1000 * rows, 1e6) == 896  # 64 * 14 of at most 940
    assert longest_that_fits(lambda rows: 1e9, 1e6) == 0


def test_missing_facts_are_named(folder):
    plain = {"target": str(folder / "target")}
    with pytest.raises(UserError, match="--data or --num-tokens"):
        estimate(PlanArgs(**plain, hardware="h100"))
    with pytest.raises(UserError, match="'h10o' is unknown.*did you mean 'h100'"):
        estimate(PlanArgs(**plain, hardware="h10o", num_tokens=1000))
    with pytest.raises(UserError, match="--gpu-memory-gb and --tflops are needed"):
        estimate(PlanArgs(**plain, num_tokens=1000))


def test_moments_are_what_the_optimizers_keep():
    draft = DraftModel(CONFIG, torch.zeros(300, 96))
    matrices, rest = split_parameters(TTTModule(draft, lambda hidden: hidden, STEPS, LossSettings()))
    both = MuonWithAuxiliary(matrices, rest, lambda left: torch.optim.AdamW(left), lr=1e-3, weight_decay=0.0)
    alone = torch.optim.AdamW(draft.parameters())
    for muon, optimizer in ((True, both), (False, alone)):
        for parameter in draft.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
        assert kept == step_memory(CONFIG, rows=8, muon=muon).moments
