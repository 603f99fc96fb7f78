"""Depths at random: the draw itself, and that what is left is right in every draw and whole in expectation."""

import dataclasses
import math

import pytest
import torch
from ttt_reference import (
    HEAD,
    RECORDS,
    STEPS,
    dynamic_by_position,
    make_draft,
    make_record,
    reference_states,
    teacher_head,
)

from fledge.drafters import cpu_kernels, depth
from fledge.drafters.batch import pack
from fledge.drafters.depth import RandomDepth, pieces_of
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.loss import LossSettings, Teacher, dense_loss, ttt_loss
from fledge.drafters.position_weights import STEP_DECAY
from fledge.drafters.runs import Run
from fledge.train.module import TTTModule


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(depth, "SMALLEST_PIECE", 2)
    monkeypatch.setattr(cpu_kernels, "MULTIPLE", 4)


def loss_of(draft, records, drawn: RandomDepth | None, settings: LossSettings | None = None, dense: bool = False):
    batch = pack(records)
    alignment = align(batch, STEPS, drawn)
    states = unroll(draft, batch, alignment, STEPS)
    ids = torch.arange(draft.config.draft_vocab_size) + draft.d2t
    teacher = Teacher(last_hidden=batch.last_hidden, head=teacher_head)
    function = dense_loss if dense else ttt_loss
    return function(states, draft.lm_head.weight, teacher, ids, draft.t2d, alignment, settings or LossSettings())


def test_the_drawing(monkeypatch):
    """Pieces of 2, depths 1 4 2 3: deepest first, the rows of every step a prefix, rows that stopped untrained."""
    monkeypatch.setattr(depth, "SMALLEST_PIECE", 2)
    monkeypatch.setattr(cpu_kernels, "MULTIPLE", 1)
    monkeypatch.setattr(RandomDepth, "draw", lambda *_: [1, 4, 2, 3])
    batch = pack([make_record(10, "aaaaaaaaaa", 1)])  # the last two rows predict nothing that teaches
    alignment = align(batch, 4, RandomDepth(0.5, (0, 0)))
    assert alignment.rows.tolist() == [2, 3, 6, 7, 4, 5, 0, 1]
    assert alignment.alive == [8, 6, 4, 2]
    assert [[(run.start, run.stop) for run in runs] for runs in alignment.runs[2:]] == [[(2, 4), (6, 8)], [(2, 4)]]
    trained = [alignment.rows[alignment.row_index[k][alignment.trained[k]]].tolist() for k in range(4)]
    assert trained == [[0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6], [2, 3], [2, 3]]  # row 7 teaches at step 0 alone
    full = align(batch, 4)
    assert (
        torch.equal(full.supervised, alignment.supervised)
        and full.alive == [8] * 4
        and (alignment.supervised >= alignment.trained).all()
    )


def test_steps_are_filled_up(monkeypatch):
    """Ten rows in fives: a multiple of 4 where there are rows to fill up with, never more than the step before had."""
    monkeypatch.setattr(cpu_kernels, "MULTIPLE", 4)
    pieces = [(Run(0, 5, 10), 3), (Run(0, 0, 5), 2)]
    assert depth.num_rows(pieces, 4) == [10, 10, 5, 0]
    assert depth.unrolled(pieces, 4) == (
        (Run(0, 5, 10), Run(0, 0, 5)), (Run(0, 5, 10), Run(0, 0, 5)), (Run(0, 5, 10), Run(0, 0, 3)), ()
    )  # fmt: skip


def test_runs_are_cut_evenly():
    assert [run.stop - run.start for run in pieces_of(Run(0, 5, 75))] == [32, 32, 6]
    assert [run.stop - run.start for run in pieces_of(Run(0, 0, 1600))] == [100] * 16


@pytest.mark.parametrize("survival", [0.8, 0.3])
def test_shares_are_what_was_asked_for(survival):
    """Over many draws every piece reaches step k with probability survival ** k; within one the shares hardly move."""
    draws = torch.tensor([RandomDepth(survival, (3, step)).draw("doc", 10, STEPS) for step in range(2000)])
    for step in range(STEPS):
        alive = (draws > step).float()
        torch.testing.assert_close(alive.mean(0), torch.full((10,), survival**step), atol=0.05, rtol=0)
        assert (alive.mean(1) - survival**step).abs().max() <= 0.1 + 1e-6
    assert draws.min() == 1 and draws.max() == STEPS


def test_draws_depend_on_document_seed_and_step_alone():
    first = RandomDepth(0.5, (1, 2)).draw("a", 20, STEPS)
    assert first == RandomDepth(0.5, (1, 2)).draw("a", 20, STEPS)
    for other in (RandomDepth(0.5, (1, 3)).draw("a", 20, STEPS), RandomDepth(0.5, (2, 2)).draw("a", 20, STEPS),
                  RandomDepth(0.5, (1, 2)).draw("b", 20, STEPS)):  # fmt: skip
        assert other != first


@pytest.mark.parametrize("eagle31", [False, True], ids=["eagle3", "eagle3.1"])
@pytest.mark.parametrize("window", [None, 5], ids=["", "window"])
def test_rows_that_stop_change_nothing_for_the_others(small_pieces, eagle31, window):
    draft, batch = make_draft(eagle31=eagle31, window=window), pack(RECORDS["packed"] + RECORDS["two turns"])
    full = align(batch, STEPS)
    whole = unroll(draft, batch, full, STEPS)
    place = {row: index for index, row in enumerate(full.rows.tolist())}
    left = 0
    for draw in range(5):
        some = align(batch, STEPS, RandomDepth(0.6, (0, draw)))
        for states, everything in zip(unroll(draft, batch, some, STEPS), whole, strict=True):
            same = [place[row] for row in some.rows[: len(states)].tolist()]
            torch.testing.assert_close(states, everything[same], atol=1e-5, rtol=1e-5)
            left += len(everything) - len(states)
    assert left > 50


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("positions", ["fixed", "dynamic"])
def test_fused_equals_dense_in_every_draw(small_pieces, average, positions):
    draft, settings = make_draft(), LossSettings(average=average, position_weights=positions)
    for draw in range(3):
        drawn = RandomDepth(0.6, (0, draw))
        found = loss_of(draft, RECORDS["packed"], drawn, settings).loss
        wanted = loss_of(draft, RECORDS["packed"], drawn, settings, dense=True)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(loss, list(draft.parameters())) for loss in (found, wanted)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_loss_and_gradient_are_the_full_ones_in_expectation(small_pieces, average, monkeypatch):
    """The mean over draws lies within its own error of full depth; unweighted it does not (control)."""
    draft, records = make_draft(), [make_record(24, "ppp" + "a" * 21, 11)]
    settings = LossSettings(average=average, position_weights="fixed")
    parameters = list(draft.parameters())

    def vector(drawn):
        loss = loss_of(draft, records, drawn, settings).loss
        return torch.cat([loss.detach()[None], *(grad.flatten() for grad in torch.autograd.grad(loss, parameters))])

    wanted = vector(None)
    draws = torch.stack([vector(RandomDepth(0.6, (5, step))) for step in range(300)])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - wanted).abs() / (error + 1e-6)).pow(2).mean() < 1.6  # of a chi-square with mean 1
    assert abs(draws[:, 0].mean() - wanted[0]) < 4 * error[0] < 0.05 * wanted[0]
    monkeypatch.setattr("fledge.drafters.loss.STEP_DECAY", STEP_DECAY * 0.6)  # as if 1 / share had been forgotten
    unweighted = loss_of(draft, records, None, settings).loss
    assert abs(draws[:, 0].mean() - unweighted) > 10 * error[0]


def test_dynamic_weights_take_what_is_left_out_to_be_as_sure_as_before(small_pieces):
    """Row by row: the last step drawn stands for those left out. Steps that were never asked stay passed over."""
    batch = pack(RECORDS["packed"] + RECORDS["two turns"])
    whole = align(batch, STEPS)
    torch.manual_seed(0)
    confidence, left_out = torch.rand(whole.row_index.shape), 0
    for draw in range(5):
        some = align(batch, STEPS, RandomDepth(0.6, (0, draw)))
        found = dynamic_by_position(some, confidence, 0.5)
        assert not found[~some.trained].any()
        for row in some.rows.tolist():
            taught = {step: int(p) for step in range(STEPS) for p in range(len(some.positions))
                      if some.supervised[step, p] and some.positions[p] - 1 - step == row}  # fmt: skip
            left = {step: p for step, p in taught.items() if some.trained[step, p]}
            sure = {step: 0.5 + 0.5 * float(confidence[step, p]) for step, p in left.items()}
            values = [sure.get(step, sure[max(left)]) for step in taught] if left else []
            reach = [math.prod(values[: index + 1]) for index in range(len(values))]
            for index, (step, p) in enumerate(taught.items()):
                if step in left:
                    assert float(found[step, p]) == pytest.approx(sum(reach[index:]) / sum(reach))
            left_out += len(taught) - len(left)
    assert left_out > 50


def test_dynamic_weights_of_an_even_draft_do_not_depend_on_the_draw(small_pieces):
    """Without what is left out (control) they would be too small."""
    batch = pack([make_record(24, "ppp" + "a" * 21, 11)])
    whole, some = align(batch, STEPS), align(batch, STEPS, RandomDepth(0.6, (0, 3)))
    confidence = torch.full(whole.row_index.shape, 0.4)
    wanted, found = (dynamic_by_position(alignment, confidence, 0.5) for alignment in (whole, some))
    torch.testing.assert_close(found[some.trained], wanted[some.trained])
    drawn = torch.zeros_like(some.pairs.supervised).index_put((some.pairs.step, some.pairs.row), torch.tensor(True))
    forgotten = dataclasses.replace(some, pairs=dataclasses.replace(some.pairs, supervised=drawn))
    passed_over = dynamic_by_position(forgotten, confidence, 0.5)
    assert (passed_over[1:][some.trained[1:]] < 0.9 * wanted[1:][some.trained[1:]]).any()


@pytest.mark.parametrize("positions", ["fixed", "dynamic"])
def test_packed_equals_separate(small_pieces, positions):
    draft, records, drawn = make_draft(), RECORDS["packed"] + RECORDS["two turns"], RandomDepth(0.6, (0, 7))
    settings = LossSettings(position_weights=positions)
    packed = loss_of(draft, records, drawn, settings)
    separate = [loss_of(draft, [record], drawn, settings) for record in records]
    torch.testing.assert_close(packed.loss, sum(one.loss for one in separate))
    for name in ("trained", "hits", "prefix_hits"):
        assert torch.equal(getattr(packed, name), sum(getattr(one, name) for one in separate)), name


def test_metrics_count_the_rows_that_are_left(small_pieces):
    """A row counts at a step when it is trained there; right so far needs every earlier step, all of which it took."""
    draft, record = make_draft(), RECORDS["one turn"][0]
    alignment = align(pack([record]), STEPS, RandomDepth(0.5, (0, 1)))
    found = loss_of(draft, [record], RandomDepth(0.5, (0, 1)))
    inside = (torch.arange(draft.config.draft_vocab_size) + draft.d2t).tolist()
    states = reference_states(draft, record)
    hits, prefix = [0] * STEPS, [0] * STEPS
    for row in alignment.rows.tolist():
        right = True
        for step in range(STEPS):
            of_row = [p for p in range(len(alignment.positions)) if alignment.rows[alignment.row_index[step, p]] == row
                      and alignment.trained[step, p]]  # fmt: skip
            if not of_row:
                right = False
                continue
            p = int(alignment.positions[of_row[0]])
            best = inside[int(draft.lm_head(draft.norm(states[step][row])).argmax())]
            hit = best == int((record.last_hidden[p] @ HEAD.T).argmax())
            right = right and hit
            hits[step], prefix[step] = hits[step] + hit, prefix[step] + right
    assert found.hits.tolist() == hits and found.prefix_hits.tolist() == prefix
    assert (
        found.trained.tolist()
        == alignment.trained.sum(1).tolist()
        != align(pack([record]), STEPS).trained.sum(1).tolist()
    )


def test_the_module_draws_by_step_and_evaluates_in_full(small_pieces):
    draft, batch = make_draft(), pack([make_record(24, "ppp" + "a" * 21, 11)])
    module = TTTModule(draft, teacher_head, STEPS, LossSettings(), survival=0.5, seed=1)
    whole = TTTModule(draft, teacher_head, STEPS, LossSettings())(batch)
    assert torch.equal(module(batch).loss, whole.loss)
    first, again, other = (module(batch, draw=step).loss for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    sure = TTTModule(draft, teacher_head, STEPS, LossSettings(), survival=1.0)
    assert torch.equal(sure(batch, draw=0).loss, whole.loss)
