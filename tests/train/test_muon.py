"""Two optimizers as one: who steps what, against each of them alone, and through a checkpoint."""

import copy

import pytest
import torch
from tiny_trainer import losses, make_trainer, samples
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim import _muon as torch_muon

from fledge.errors import UserError
from fledge.train import muon
from fledge.train.muon import MuonWithAuxiliary, split_parameters


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.lm_head = nn.Linear(6, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.fc(x)))


def both(model: Small) -> MuonWithAuxiliary:
    matrices, rest = split_parameters(model)
    return MuonWithAuxiliary(matrices, rest, lambda left: AdamW(left, lr=0.01), lr=0.01, weight_decay=0.1)


def take_steps(model: Small, optimizers: list, num: int, *, first: int = 0) -> None:
    for number in range(first, first + num):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        model(x).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_matrices_by_muon_and_the_rest_beside(monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda: True)  # else ours iterates in fp32
    model, twin = Small(), Small()
    assert [len(part) for part in split_parameters(model)] == [1, 3]
    take_steps(model, [both(model)], 4)
    separate = [
        Muon([twin.fc.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW([*twin.norm.parameters(), *twin.lm_head.parameters()], lr=0.01),
    ]
    take_steps(twin, separate, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    alone = Small()
    take_steps(alone, [AdamW(alone.parameters(), lr=0.01)], 4)
    assert not torch.allclose(alone.fc.weight, model.fc.weight)  # control


def test_a_checkpoint_carries_both_states():
    model = Small()
    optimizer = both(model)
    take_steps(model, [optimizer], 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    take_steps(model, [optimizer], 3, first=3)
    again = Small()
    again.load_state_dict(saved[0])
    loaded = both(again)
    take_steps(again, [fresh := both(again)], 0)
    loaded.load_state_dict(saved[1])
    take_steps(again, [loaded], 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.load_state_dict(saved[0])
    take_steps(again, [fresh], 3, first=3)
    assert not torch.allclose(model.fc.weight, again.fc.weight)  # control: without the momentum


def test_a_schedule_moves_both():
    optimizer = both(Small())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]


def test_the_flag_is_obeyed(tmp_path, monkeypatch):
    data, found = samples(8), {}
    for wanted in ("auto", "muon", "same"):
        trainer = make_trainer(tmp_path / wanted, data, save_strategy="no", matrix_optim=wanted)
        trainer.train()
        found[wanted] = losses(trainer)
    assert found["auto"] == found["muon"] != found["same"]
    sharded = make_trainer(tmp_path / "sharded", data, matrix_optim="muon")
    monkeypatch.setattr(type(sharded), "sharded", True)
    with pytest.raises(UserError, match="--matrix_optim muon needs whole matrices"):
        sharded.create_optimizer()
    sharded.args.matrix_optim = "auto"  # type: ignore[attr-defined]  # the arguments are ours
    sharded.optimizer = None
    assert not isinstance(sharded.create_optimizer(), MuonWithAuxiliary)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_in_fp32_where_the_processor_has_no_bf16(shape, monkeypatch):
    """PyTorch's own iteration to what bf16 rounds away; afterwards PyTorch's is in place again."""
    theirs, grad = (
        torch_muon._zeropower_via_newtonschulz,
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    )
    given = (grad, (3.4445, -4.775, 2.0315), 5, 1e-7)
    torch.testing.assert_close(muon.orthogonalised(*given), theirs(*given).float(), rtol=0.05, atol=0.02)
    used: list[torch.Tensor] = []
    ours = muon.orthogonalised
    monkeypatch.setattr(muon, "orthogonalised", lambda *given: used.append(given[0]) or ours(*given))
    for able in (True, False):
        monkeypatch.setattr(muon, "multiplies_bf16", lambda able=able: able)
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = grad.clone()
        MuonWithAuxiliary([weight], [torch.nn.Parameter(torch.zeros(2))], AdamW, lr=0.1, weight_decay=0.0).step()
        assert len(used) == (not able) and weight.abs().max() > 0
        assert torch_muon._zeropower_via_newtonschulz is theirs
