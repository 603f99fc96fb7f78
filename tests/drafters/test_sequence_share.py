"""Rows of a sequence divided among processes: the sum of what they compute is what one computes."""

import dataclasses

import pytest
import torch
from ttt_reference import STEPS, make_draft, make_record, teacher_head

from fledge.drafters import cpu_kernels, depth
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.ttt import align
from fledge.drafters.loss import LossSettings
from fledge.drafters.runs import Run
from fledge.drafters.sequence_share import Share
from fledge.train.module import TTTModule

RECORDS = [make_record(23, "pppp" + "a" * 12 + "pp" + "a" * 5, 1), make_record(9, "paaaaaaaa", 2)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(depth, "SMALLEST_PIECE", 2)
    monkeypatch.setattr(cpu_kernels, "MULTIPLE", 4)


def step(share: Share | None, survival: float, average: str = "sequence") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process."""
    draft = make_draft()
    module = TTTModule(draft, teacher_head, STEPS, LossSettings(average=average), survival=survival, share=share)
    loss = module(pack(RECORDS), draw=3).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in draft.named_parameters()}


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("survival", [1.0, 0.6])
@pytest.mark.parametrize("count", [2, 3])
def test_the_sum_over_processes_is_one_process(count, survival, average):
    loss, grads = step(None, survival, average)
    parts = [step(Share(index, count), survival, average) for index in range(count)]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        together = torch.stack([part[name] for _, part in parts]).sum(0)
        torch.testing.assert_close(together, grad, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(parts[0][1][name], grad, rtol=0.1), "control: a part alone"


def test_each_row_is_unrolled_by_one_process():
    batch = pack(RECORDS)
    rows = [align(batch, STEPS, share=Share(index, 2)).rows.tolist() for index in range(2)]
    assert sorted(rows[0] + rows[1]) == sorted(align(batch, STEPS).rows.tolist())
    assert abs(len(rows[0]) - len(rows[1])) <= 4


def test_the_drawing():
    pieces = [(Run(0, start, start + 2), 1) for start in (0, 2, 4, 6)]
    assert [[piece.start for piece, _ in Share(index, 2).of(pieces)] for index in (0, 1)] == [[0, 4], [2, 6]]


def test_a_process_without_rows_reaches_every_parameter():
    """A sequence shorter than two pieces leaves the others nothing to do, and they still synchronise."""
    short = [dataclasses.replace(make_record(4, "paaa", 1))]
    draft = make_draft()
    module = TTTModule(draft, teacher_head, STEPS, LossSettings(), share=Share(1, 2))
    loss = module(pack(short)).loss
    loss.backward()
    assert loss.item() == 0 and all(weight.grad is not None for weight in draft.parameters())
