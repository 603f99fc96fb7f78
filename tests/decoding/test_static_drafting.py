"""Drafting for several sequences at once against drafting for each alone: same trees, round after round."""

import dataclasses

import pytest
import torch
from tiny import prompt, tiny_draft, tiny_target

from fledge.decoding.drafting import Drafter
from fledge.decoding.records import TreeShape
from fledge.decoding.static_drafting import BatchDrafter
from fledge.draft.model import DraftModel

CAPACITY, BUCKET = 64, 48
LENGTHS = (9, 2, 14)
PIECES = ((1, 1, 1), (3, 1, 2), (2, 3, 1))  # new tokens of each sequence, by round


def features_of(draft: DraftModel, ids: list[int]) -> torch.Tensor:
    return draft.fuse(tiny_target("llama").forward(torch.tensor([ids])).tap_hidden[0].clone())


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", [TreeShape(12, 3, 3), TreeShape(6, 4, 1), TreeShape(9, 0, 5), TreeShape(60, 2, 4)])
def test_drafted_like_each_alone(shape, window, monkeypatch):
    draft = tiny_draft(tiny_target("llama"), eagle31=shape.depth == 3)
    monkeypatch.setattr(draft, "config", dataclasses.replace(draft.config, sliding_window=window))
    texts = [prompt(length + 6, seed=length) for length in LENGTHS]
    with torch.inference_mode():
        fused = [features_of(draft, ids) for ids in texts]
        alone = [Drafter(draft, shape, CAPACITY) for _ in LENGTHS]
        batch = BatchDrafter(draft, shape, len(LENGTHS), CAPACITY)
        slots = shape.levels + 1
        done = [length - 1 for length in LENGTHS]
        for row, end in enumerate(done):
            batch.fill(row, torch.tensor(texts[row])[1:end], fused[row][: end - 1])
            alone[row].extend(torch.tensor(texts[row][1:end]), fused[row][: end - 1]) if end > 1 else None
        for round_, pieces in enumerate(PIECES):
            num_new = [min(new, slots) for new in pieces]
            tokens = torch.randint(0, 100, (len(LENGTHS), slots))
            features = torch.randn(len(LENGTHS), slots, fused[0].shape[1])  # slots without tokens hold anything
            expected = []
            for row, new in enumerate(num_new):
                start, end = done[row], done[row] + new
                tokens[row, :new], features[row, :new] = (
                    torch.tensor(texts[row][start:end]), fused[row][start - 1 : end - 1],
                )  # fmt: skip
                hidden = alone[row].extend(tokens[row, :new], features[row, :new])
                expected.append(alone[row].grow(tokens[row, new - 1 : new], hidden, shape.levels))
                done[row] = end
            trees = batch.grow(torch.tensor(done) - 1, tokens, torch.tensor(num_new), features, BUCKET)
            for row, tree in enumerate(expected):
                assert torch.equal(trees.token_ids[row], tree.token_ids), (round_, row)
                assert torch.equal(trees.parents[row], tree.parents)


def test_a_window_shows():
    """The negative control of the windowed cases."""
    draft = tiny_draft(tiny_target("llama"))
    ids = prompt(14)
    with torch.inference_mode():
        fused, trees = features_of(draft, ids), []
        for window in (None, 4):
            draft.config = dataclasses.replace(draft.config, sliding_window=window)
            batch = BatchDrafter(draft, TreeShape(12, 3, 3), 1, CAPACITY)
            batch.fill(0, torch.tensor(ids[1:13]), fused[:12])
            last = torch.tensor([[ids[13]] * 5])
            trees.append(
                batch.grow(torch.tensor([13]), last, torch.tensor([1]), fused[None, 12:13].repeat(1, 5, 1), 48)
            )
    assert not torch.equal(trees[0].token_ids, trees[1].token_ids)
