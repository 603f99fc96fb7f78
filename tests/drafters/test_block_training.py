"""Training of block drafts equals its definition: block by block, from the formulas, by autograd."""

import pytest
import torch
from block_reference import block_states as reference_states
from block_reference import draft_logits, lively
from torch import Tensor
from ttt_reference import HEAD, RECORDS, SIZE, VOCAB, make_record, teacher_head

from fledge.drafters.batch import Batch, pack
from fledge.drafters.dspark.attention import block_attention, chunks_of, dense_block_attention
from fledge.drafters.dspark.blocks import Blocks, draw_blocks
from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.dspark.loss import DECAY, MIX, BlockLossSettings
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.training import BlockModule, block_states
from fledge.drafters.position_weights import CONFIDENCE_FLOOR

ALL = 10_000  # anchors: every one there is
KINDS = [
    {"markov_rank": 0, "sample_from_anchor": False},
    {"markov_rank": 6, "sample_from_anchor": True, "confidence": True},
    {"markov_rank": 6, "sample_from_anchor": False, "confidence": True, "causal": True, "sliding_window": 3},
    {"markov_rank": 0, "sample_from_anchor": True, "draft_vocab_size": VOCAB},
]


def make_block_draft(**overrides) -> BlockDraft:
    torch.manual_seed(0)
    values = dict(
        hidden_size=SIZE, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=VOCAB, draft_vocab_size=24, tap_layers=(1, 2, 3), num_layers=2, block_size=4, mask_token_id=7,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    config = BlockConfig(**{**values, **overrides})
    return lively(BlockDraft(config, torch.randn(VOCAB, SIZE), HEAD))


def module_of(draft: BlockDraft, *, num_anchors: int = ALL, **settings) -> BlockModule:
    return BlockModule(draft, teacher_head, BlockLossSettings(**settings), num_anchors=num_anchors)


def all_blocks(batch: Batch, draft: BlockDraft) -> Blocks:
    return draw_blocks(batch, draft.config.num_drafts, ALL, (0,))


def test_what_is_supervised():
    """The drawing of `blocks.py`: p is a prompt's token, a an answer's. Two drafts of a block, in two documents."""
    batch = pack([make_record(8, "pppaaapa", 1), make_record(4, "aaaa", 2)])
    blocks = draw_blocks(batch, 2, ALL, (0,))
    assert blocks.rows.tolist() == [3, 4, 9, 10] and blocks.document.tolist() == [0, 0, 1, 1]
    assert blocks.supervised.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    assert blocks.candidates.tolist() == [2, 2] and blocks.first.tolist() == [0, 0, 8, 8]


def test_anchors_are_drawn_anew_and_alike():
    """Another draw at every step, the same one for the same step, whatever else is in the batch."""
    record, other = make_record(60, "p" * 5 + "a" * 55, 1), make_record(40, "a" * 40, 2)
    drawn = [draw_blocks(pack([record]), 3, 10, (0, step)).rows for step in (1, 2, 1)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert len(drawn[0].unique()) == 10 and torch.equal(drawn[0], drawn[0].sort().values)
    together = draw_blocks(pack([other, record]), 3, 10, (0, 1))
    assert torch.equal(together.rows[together.document == 1] - 40, drawn[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_dense_one(window, causal, monkeypatch):
    """Output and gradients, with several chunks of blocks in a document."""
    monkeypatch.setattr("fledge.drafters.dspark.attention.QUERIES", {"cpu": 12})
    batch = pack(RECORDS["packed"] + RECORDS["two turns"] + [make_record(40, "p" * 4 + "a" * 36, 8)])
    blocks = draw_blocks(batch, 3, 9, (0,))
    num_rows, slots = len(batch.input_ids), 4
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(blocks), slots, 4, 8), *[(len(blocks), slots, 2, 8)] * 2, *[(num_rows, 2, 8)] * 2]
    parts = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    chunks = chunks_of(blocks, slots, num_rows, window, torch.device("cpu"))
    assert len(chunks) > len(blocks.document.unique())
    q, k, v, context_k, context_v = parts
    found = block_attention(q, k, v, context_k, context_v, chunks, causal)
    expected = dense_block_attention(q, k, v, context_k, context_v, blocks, window, causal)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted = torch.randn(found.shape, generator=generator)
    for one, two in zip(
        torch.autograd.grad(found, parts, wanted), torch.autograd.grad(expected, parts, wanted), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", KINDS)
@pytest.mark.parametrize("records", ["packed", "two turns"])
@torch.no_grad()
def test_states_are_those_of_each_block_alone(overrides, records):
    """Packed blocks give what the definition gives one at a time: what drafting computes, too (test_block_propose)."""
    draft, batch = make_block_draft(**overrides), pack(RECORDS[records])
    blocks = all_blocks(batch, draft)
    found = block_states(draft, batch, blocks)
    for number, (row, first) in enumerate(zip(blocks.rows.tolist(), blocks.first.tolist(), strict=True)):
        document = slice(first, len(batch.input_ids))
        expected = reference_states(
            draft, batch.input_ids[document], batch.tap_hidden[document], batch.position_ids[document], row - first
        )  # fmt: skip
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=1e-4)


def slow_loss(draft: BlockDraft, batch: Batch, settings: BlockLossSettings) -> Tensor:
    """The loss written from its formulas, one block and one draft at a time."""
    blocks, ids = all_blocks(batch, draft), draft.target_ids(torch.arange(draft.config.draft_vocab_size))
    total, of_ce, of_tv = torch.zeros(()), *MIX[settings.kind]
    for document in blocks.document.unique().tolist():
        mine = blocks.document == document
        num_pairs, summed = int(blocks.supervised[mine].sum()), torch.zeros(())
        for row, first, supervised in zip(
            blocks.rows[mine].tolist(), blocks.first[mine].tolist(), blocks.supervised[mine].tolist(), strict=True
        ):
            part = slice(first, len(batch.input_ids))
            states = reference_states(
                draft, batch.input_ids[part], batch.tap_hidden[part], batch.position_ids[part], row - first
            )  # fmt: skip
            losses, confident, counts = [], [], []
            for number in range(sum(supervised)):
                before = int(batch.input_ids[row + number])
                log_q = draft_logits(draft, states, number, before).log_softmax(-1)
                target = teacher_head(batch.last_hidden[row + number])
                p, whole = target[ids].softmax(-1), target.softmax(-1)[ids]
                overlap = torch.minimum(whole, log_q.exp()).sum()
                value = of_ce * -(p * log_q).sum() + of_tv * (1 - overlap)
                if settings.kind == "kl":
                    value = value + (p * p.log()).sum()
                choice = (ids == target.argmax()).nonzero()
                counts.append(float(len(choice) > 0))
                confident.append(float(log_q[choice[0, 0]].detach().exp()) if len(choice) else 0.0)
                losses.append(value)
                if draft.confidence_head is not None:
                    state = states[number + draft.config.first_slot]
                    embedding = draft.markov_head.markov_w1.weight[before]
                    logit = draft.confidence_head.proj(torch.cat((state, embedding)))[0]
                    aim = overlap.detach()
                    bce = -(aim * logit.sigmoid().log() + (1 - aim) * (1 - logit.sigmoid()).log())
                    summed = summed + bce * torch.exp(torch.tensor(-number / DECAY))
            floored = [CONFIDENCE_FLOOR + (1 - CONFIDENCE_FLOOR) * one for one in confident]
            reach = torch.tensor(floored).cumprod(0)
            for number, (value, count) in enumerate(zip(losses, counts, strict=True)):
                weight = torch.exp(torch.tensor(-number / DECAY))
                if settings.position_weights == "dynamic":
                    weight = reach[number:].sum() / reach.sum()
                summed = summed + value * weight * count
        share = int(blocks.candidates[document]) if settings.average == "token" else 1
        total = total + summed * share / num_pairs
    return total


@pytest.mark.parametrize("kind", ["ce", "ce+tv", "kl"])
@pytest.mark.parametrize("position_weights", ["fixed", "dynamic"])
@pytest.mark.parametrize("overrides", KINDS[:3])
def test_loss_and_gradients_are_the_formulas(overrides, kind, position_weights, monkeypatch):
    monkeypatch.setattr("fledge.drafters.dspark.loss.pairs_of_chunk", lambda *sizes, **flags: 10)
    average = "token" if kind == "kl" else "sequence"
    settings = BlockLossSettings(kind=kind, position_weights=position_weights, average=average)
    draft, batch = make_block_draft(**overrides), pack(RECORDS["packed"] + RECORDS["two turns"])
    trained = {name: weight for name, weight in draft.named_parameters() if weight.requires_grad}
    assert "lm_head.weight" not in trained
    found = BlockModule(draft, teacher_head, settings, num_anchors=ALL)(batch).loss
    of_found = torch.autograd.grad(found, list(trained.values()))
    expected = slow_loss(draft, batch, settings)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for name, one, two in zip(trained, of_found, torch.autograd.grad(expected, list(trained.values())), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_packed_is_separate():
    for overrides in KINDS[:2]:
        draft = make_block_draft(**overrides)
        together = module_of(draft)(pack(RECORDS["packed"]))
        apart = [module_of(draft)(pack([record])) for record in RECORDS["packed"]]
        for name in ("loss", "step_loss", "trained", "hits", "prefix_hits", "overlap", "covered", "positions"):
            summed = sum(getattr(one, name) for one in apart)
            torch.testing.assert_close(getattr(together, name), summed, atol=1e-4, rtol=1e-4)


def test_metrics_are_counted_by_slot():
    """acc_k, the overlap and tau come from sums over the supervised drafts of each number."""
    draft, batch = make_block_draft(**KINDS[1]), pack(RECORDS["packed"])
    blocks, found = all_blocks(batch, draft), module_of(draft)(batch)
    assert torch.equal(found.trained, blocks.supervised.sum(0)) and int(found.positions) == len(blocks)
    ids, hits, prefix = draft.target_ids(torch.arange(24)), torch.zeros(4), torch.zeros(4)
    for row, first, supervised in zip(
        blocks.rows.tolist(), blocks.first.tolist(), blocks.supervised.tolist(), strict=True
    ):
        part, right = slice(first, len(batch.input_ids)), True
        states = reference_states(
            draft, batch.input_ids[part], batch.tap_hidden[part], batch.position_ids[part], row - first
        )  # fmt: skip
        for number in range(sum(supervised)):
            drafted = ids[draft_logits(draft, states, number, int(batch.input_ids[row + number])).argmax()]
            hit = bool(drafted == teacher_head(batch.last_hidden[row + number]).argmax())
            right = right and hit
            hits[number] += hit
            prefix[number] += right
    assert found.hits.tolist() == hits.tolist() and found.prefix_hits.tolist() == prefix.tolist()
    assert hits.sum() > 0, "nothing was right: the count proves little"


def test_a_batch_that_teaches_nothing_reaches_every_parameter():
    draft = make_block_draft(**KINDS[1])
    loss = module_of(draft)(pack([make_record(5, "ppppp", 1)])).loss
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is not None for weight in draft.parameters() if weight.requires_grad)
