"""TTT unrolling and loss against eagle3's definition, written out row by row, and against decoding with a cache."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ttt_reference import (
    DRAFT_VOCAB,
    HEAD,
    RECORDS,
    SIZE,
    STEPS,
    VOCAB,
    dynamic_by_position,
    make_draft,
    make_record,
    reference_loss,
    reference_states,
    teacher_head,
)

from fledge.drafters.batch import Batch, pack
from fledge.drafters.cpu_kernels import filled_up, num_filler
from fledge.drafters.depth import RandomDepth
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.loss import LossSettings, PositionWeights, Teacher, dense_loss, ttt_loss
from fledge.target.head import TargetHead
from fledge.target.quirks import LogitQuirks
from fledge.target.record import TeacherSummary
from fledge.train.module import TTTModule


def refused(hidden: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the whole head is not asked where a summary is known")


def run_loss(draft: DraftModel, batch: Batch, settings: LossSettings, *, short: bool = False):
    """The fused loss (short: from the draft vocabulary's logits and a summary) and the dense one."""
    alignment = align(batch, STEPS)
    states = unroll(draft, batch, alignment, STEPS)
    draft_ids = torch.arange(DRAFT_VOCAB) + draft.d2t
    teacher = Teacher(last_hidden=batch.last_hidden, head=teacher_head)
    if short:
        summary = TeacherSummary.of(teacher_head, batch.last_hidden, batch.loss_mask)
        quirks = LogitQuirks(soft_cap=4.0)
        ends = TargetHead(embedding=HEAD, weight=HEAD, bias=None, quirks=quirks, keys=("lm_head.weight",))
        teacher = dataclasses.replace(teacher, head=refused, draft_head=ends.rows(draft_ids), summary=summary)
    arguments = (draft.lm_head.weight, teacher, draft_ids, draft.t2d, alignment, settings)
    if short:
        whole = dataclasses.replace(teacher, head=teacher_head)
        return ttt_loss(states, *arguments), dense_loss(states, draft.lm_head.weight, whole, *arguments[2:])
    return ttt_loss(states, *arguments), dense_loss(states, *arguments)


# -- the definition, row by row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("eagle31", [False, True], ids=["eagle3", "eagle3.1"])
@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("positions", ["fixed", "dynamic"])
def test_loss_and_gradients_equal_the_definition(case: str, eagle31: bool, positions: PositionWeights, layers: int):
    draft = make_draft(eagle31=eagle31, layers=layers)
    parameters = list(draft.parameters())
    found, dense = run_loss(draft, pack(RECORDS[case]), LossSettings(position_weights=positions))
    wanted = reference_loss(draft, RECORDS[case], positions=positions)
    torch.testing.assert_close(found.loss, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense, wanted, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_first_drafted_token_is_trained():
    """Rows P - 1, which predict the first token the draft ever proposes, get gradient; unshifted masks skip them.

    With the mask of other trainers the same data gives another loss: the reference notices.
    """
    draft, record = make_draft(), RECORDS["one turn"][0]
    prompt_length = int((~record.loss_mask).sum())
    alignment = align(pack([record]), STEPS)
    first_rows = alignment.rows[alignment.row_index[0]]
    assert int(first_rows.min()) == prompt_length - 1
    found, _ = run_loss(draft, pack([record]), LossSettings())
    assert (reference_loss(draft, [record], shift=1) - found.loss).abs() < 1e-5
    assert (reference_loss(draft, [record], shift=0) - found.loss).abs() > 1e-2


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("positions", ["fixed", "dynamic"])
@pytest.mark.parametrize("short", [False, True], ids=["whole head", "summary"])
def test_fused_equals_dense(average, positions, short, monkeypatch):
    draft = make_draft()
    parameters = list(draft.parameters())
    settings = LossSettings(average=average, position_weights=positions)
    monkeypatch.setattr(
        "fledge.drafters.loss.pairs_per_chunk", lambda *_, **__: 9
    )  # several chunks, the last one short
    found, dense = run_loss(draft, pack(RECORDS["packed"]), settings, short=short)
    torch.testing.assert_close(found.loss, dense, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, parameters, retain_graph=True),
        torch.autograd.grad(dense, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_packed_equals_separate():
    draft = make_draft()
    parameters = list(draft.parameters())
    records = RECORDS["packed"] + RECORDS["two turns"]
    packed, _ = run_loss(draft, pack(records), LossSettings())
    separate = sum(run_loss(draft, pack([record]), LossSettings())[0].loss for record in records)
    torch.testing.assert_close(packed.loss, separate)
    for ours, theirs in zip(
        torch.autograd.grad(packed.loss, parameters), torch.autograd.grad(separate, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class GrowingCache:
    """The simplest cache there is: concatenation."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys, values, layer=0):
        before = self.layers.get(layer, (keys[:, :, :0], values[:, :, :0]))
        self.layers[layer] = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        return self.layers[layer]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("eagle31", [False, True], ids=["eagle3", "eagle3.1"])
@pytest.mark.parametrize("window", [None, 5], ids=["", "window"])
def test_unrolled_logits_equal_decoding_with_a_cache(eagle31: bool, window: int | None, layers: int):
    """One draft definition: row t of the unrolled training is the draft decoding from prefix t."""
    draft, record = make_draft(eagle31=eagle31, window=window, layers=layers), RECORDS["two turns"][0]

    def seen(num_rows: int) -> torch.Tensor | None:
        return None if window is None else window_mask(num_rows, window)

    batch = pack([record])
    alignment = align(batch, STEPS)
    unrolled = draft.lm_head(torch.stack(unroll(draft, batch, alignment, STEPS)))
    features = draft.fuse(record.tap_hidden)
    for index, t in enumerate(alignment.rows.tolist()):
        cache = GrowingCache()
        out = draft.step(
            record.input_ids[None, 1 : t + 2], features[None, : t + 1], torch.arange(t + 1)[None], cache, seen(t + 1)
        )
        hidden = out[:, -1:]
        for step in range(STEPS):
            torch.testing.assert_close(draft.logits(hidden)[0, 0], unrolled[step, index], atol=2e-5, rtol=1e-4)
            if t + 2 + step >= len(record):
                break
            token = record.input_ids[None, t + 2 + step, None]
            mask = seen(t + 2 + step)
            hidden = draft.step(
                token,
                draft.feedback(hidden),
                torch.tensor([[t + 1 + step]]),
                cache,
                None if mask is None else mask[-1:],
            )


def window_mask(num_rows: int, window: int) -> torch.Tensor:
    """(R, R) bool: row i sees rows i - window + 1 .. i."""
    distance = torch.arange(num_rows)[:, None] - torch.arange(num_rows)
    return (distance >= 0) & (distance < window)


@pytest.mark.parametrize("eagle31, layers", [(False, 1), (True, 1), (True, 3)], ids=["eagle3", "eagle3.1", "3 layers"])
def test_recomputed_steps_give_the_same_gradients_and_keep_less(eagle31: bool, layers: int):
    """Activation checkpointing changes no bit; what is saved for the backward shrinks."""
    draft, batch = make_draft(eagle31=eagle31, layers=layers), pack(RECORDS["packed"] + RECORDS["two turns"])
    alignment, results, kept = align(batch, STEPS), [], []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            states = torch.stack(unroll(draft, batch, alignment, STEPS, recompute=recompute))
        kept.append(sum(sizes.values()))
        results.append([states, *torch.autograd.grad(states.pow(3).sum(), list(draft.parameters())[:-1])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.7 * kept[0], kept


def test_dynamic_weights_are_the_share_of_the_expected_length():
    """Three steps of one row; a sure draft weighs depth, an unsure one hardly; a miss early makes later steps small."""
    alignment = align(pack([make_record(7, "aaaaaaa", 1)]), 3)

    def weights(row_confidence: list[float], floor: float) -> list[float]:
        confidence = torch.zeros(alignment.row_index.shape)
        row = int(alignment.row_index[2, -1])  # a row that is trained at all three steps
        for step, value in enumerate(row_confidence):
            confidence[step][alignment.row_index[step] == row] = value
        found = dynamic_by_position(alignment, confidence, floor)
        return [float(found[step][alignment.row_index[step] == row]) for step in range(3)]

    assert weights([1, 1, 1], 0.0) == pytest.approx([1, 2 / 3, 1 / 3])
    assert weights([0, 0, 0], 0.5) == pytest.approx([1, 0.375 / 0.875, 0.125 / 0.875])
    assert weights([1, 0, 1], 0.0) == pytest.approx([1, 0, 0])
    prompted = align(pack([make_record(8, "pppaaaaa", 1)]), 3)
    found = dynamic_by_position(prompted, torch.zeros(prompted.row_index.shape), 0.5)
    assert prompted.trained[:, 0].tolist() == [True, True, True] and prompted.rows[prompted.row_index[2, 0]] == 0
    assert float(found[2, 0]) == 1.0  # row 0 is trained at step 2 alone: steps it is not trained at are passed over


def test_a_whole_vocabulary_needs_no_map():
    """draft_vocab_size = vocabulary: every position counts, and the loss equals the definition with all tokens."""
    config = dataclasses.replace(make_draft().config, draft_vocab_size=VOCAB)
    torch.manual_seed(0)
    draft = DraftModel(config, torch.randn(VOCAB, SIZE))
    batch = pack(RECORDS["packed"])
    alignment = align(batch, STEPS)
    states = unroll(draft, batch, alignment, STEPS)
    teacher = Teacher(last_hidden=batch.last_hidden, head=teacher_head)
    arguments = (draft.lm_head.weight, teacher, torch.arange(VOCAB), draft.t2d, alignment, LossSettings())
    found, dense = ttt_loss(states, *arguments), dense_loss(states, *arguments)
    torch.testing.assert_close(found.loss, dense, atol=1e-5, rtol=1e-5)
    assert int(found.covered) == int(found.positions)


def test_metrics_count_what_they_say():
    draft, records = make_draft(), RECORDS["packed"]
    found, _ = run_loss(draft, pack(records), LossSettings())
    inside = (torch.arange(DRAFT_VOCAB) + draft.d2t).tolist()
    hits, prefix, trained = [0] * STEPS, [0] * STEPS, [0] * STEPS
    for record in records:
        states, mask, length = reference_states(draft, record), record.loss_mask, len(record)
        for t in range(length):
            right = True
            for step in range(STEPS):
                p = t + 1 + step
                if p + 1 >= length or not (mask[p] and mask[p + 1]):
                    right = False
                    continue
                best = inside[int(draft.lm_head(draft.norm(states[step][t])).argmax())]
                hit = best == int(teacher_head(record.last_hidden[p]).argmax())
                right = right and hit
                trained[step], hits[step], prefix[step] = trained[step] + 1, hits[step] + hit, prefix[step] + right
    assert (found.trained.tolist(), found.hits.tolist()) == (trained, hits)
    assert found.prefix_hits.tolist() == prefix
    assert 0 < int(found.covered) < int(found.positions)


def test_overlap_is_the_acceptance_probability():
    """sum_v min(p, q) with p the target's *full* distribution: tokens outside the draft vocabulary are rejections."""
    draft, record = make_draft(), RECORDS["one turn"][0]
    with torch.no_grad():
        found, _ = run_loss(draft, pack([record]), LossSettings())
    inside = torch.arange(DRAFT_VOCAB) + draft.d2t
    states, expected = reference_states(draft, record), 0.0
    for t in range(2, 7):
        full = teacher_head(record.last_hidden[t + 1]).softmax(-1)
        q = F.softmax(draft.lm_head(draft.norm(states[0][t])), -1)
        expected += torch.minimum(full[inside], q).sum()
    torch.testing.assert_close(found.overlap[0], expected)


def test_position_ids_of_the_record_are_used():
    """Negative control for rope: shifted positions change nothing (rotary is relative), stretched ones do."""
    draft, record = make_draft(), RECORDS["one turn"][0]

    def loss(positions):
        return run_loss(draft, pack([dataclasses.replace(record, position_ids=positions)]), LossSettings())[0].loss

    base = loss(record.position_ids)
    assert (loss(record.position_ids + 5) - base).abs() < 1e-4
    assert (loss(record.position_ids * 3) - base).abs() > 1e-3


def test_warm_start_begins_where_the_target_is():
    """f has RMS 1 whatever the scale of the taps, the highest tap dominates it, and the first logits are unsure."""
    draft, taps = make_draft(), torch.randn(200, 3, SIZE) * torch.tensor([1.0, 5.0, 300.0])[:, None]
    head = torch.randn(VOCAB, SIZE) * 4
    draft.warm_start(head, taps)
    features = draft.fuse(taps).detach()
    assert abs(float(features.pow(2).mean(-1).sqrt().median()) - 1) < 1e-4
    alike = F.cosine_similarity(features, taps[:, 2], dim=-1)
    assert alike.median() > 0.9 and F.cosine_similarity(features, taps[:, 1], dim=-1).abs().median() < 0.5
    assert torch.equal(draft.lm_head.weight, head[torch.arange(DRAFT_VOCAB) + draft.d2t])
    with torch.no_grad():
        assert 0.5 < draft.logits(features).std() < 2.5 < (features @ draft.lm_head.weight.T).std()


def test_metrics_are_the_same_from_a_summary():
    draft, batch = make_draft(), pack(RECORDS["packed"])
    with torch.no_grad():
        whole, _ = run_loss(draft, batch, LossSettings())
        short, _ = run_loss(draft, batch, LossSettings(), short=True)
    for name in whole._fields:
        torch.testing.assert_close(getattr(short, name), getattr(whole, name), msg=name)
    assert 0 < int(whole.covered) < int(whole.positions)  # both kinds of positions were there


def test_module_asks_the_whole_head_only_without_summaries():
    draft, records, asked = make_draft(), RECORDS["packed"], []
    ends = TargetHead(embedding=HEAD, weight=HEAD, bias=None, quirks=LogitQuirks(soft_cap=4.0), keys=("w",))

    def head(hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return teacher_head(hidden)

    module = TTTModule(draft, head, STEPS, LossSettings(), ends.rows)
    told = [
        dataclasses.replace(record, summary=TeacherSummary.of(teacher_head, record.last_hidden, record.loss_mask))
        for record in records
    ]
    short = module(pack(told)).loss
    assert not asked
    whole = module(pack([*told[:-1], records[-1]])).loss  # one record without is enough
    assert asked
    torch.testing.assert_close(short, whole)
    wrong = dataclasses.replace(told[0].summary, argmax=told[0].summary.argmax * 0 + int((~draft.t2d).nonzero()[0]))
    lied = module(pack([dataclasses.replace(told[0], summary=wrong), *told[1:]])).loss
    assert abs((lied - short).item()) > 1e-2  # control: the summary is what counts


@pytest.mark.parametrize("survival", [1.0, 0.6])
@pytest.mark.parametrize("eagle31", [False, True], ids=["eagle3", "eagle3.1"])
def test_a_filler_changes_shapes_alone(survival: float, eagle31: bool, monkeypatch):
    """All rows and all unrolled rows are multiples; loss, gradients and counts are those without the filler."""
    monkeypatch.setattr("fledge.drafters.cpu_kernels.MULTIPLE", 5)
    draft, records = make_draft(eagle31=eagle31), RECORDS["packed"] + RECORDS["two turns"]
    depth = RandomDepth(survival, (0, 1)) if survival < 1 else None
    found = []
    for batch in (pack(records), pack(filled_up(records, torch.device("cpu")))):
        alignment = align(batch, STEPS, depth)
        states = unroll(draft, batch, alignment, STEPS)
        teacher = Teacher(last_hidden=batch.last_hidden, head=teacher_head)
        ids = torch.arange(DRAFT_VOCAB) + draft.d2t
        output = ttt_loss(states, draft.lm_head.weight, teacher, ids, draft.t2d, alignment, LossSettings())
        grads = torch.autograd.grad(output.loss, list(draft.parameters()))
        found.append((batch, alignment, output, grads))
    (plain, bare, wanted, grads), (filled, alignment, output, filled_grads) = found
    assert len(plain.input_ids) % 5 and bare.alive[0] % 5 and not num_filler(plain)  # control: without it they are not
    assert len(filled.input_ids) % 5 == alignment.alive[0] % 5 == 0 and num_filler(filled) >= 5
    for name in output._fields:
        torch.testing.assert_close(getattr(output, name), getattr(wanted, name), msg=name)
    for ours, theirs in zip(filled_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
