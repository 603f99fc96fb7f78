"""Proposing with a head against drafting without a batch, a beam mask or tensors: path by path, node by node."""

import dataclasses

import pytest
import torch
from tiny import prompt, tiny_draft, tiny_target

from fledge.drafters.base import Emitted
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.propose import DraftCache, EagleProposer
from fledge.drafters.tree import Trees, TreeShape

CAPACITY, NUM_KEYS = 128, 96
SHAPES = (TreeShape(12, 3, 3), TreeShape(6, 4, 1), TreeShape(9, 0, 5), TreeShape(3, 3, 10), TreeShape(60, 2, 4))


def taps_of(ids: list[int]) -> torch.Tensor:
    """(T, A, H)"""
    return tiny_target("llama").forward(torch.tensor([ids])).tap_hidden[0].clone()


def emitted(*rows: tuple[list[int], torch.Tensor, int], slots: int = 0) -> Emitted:
    """New tokens of sequences: (all ids up to the root, their taps, how many are new). Free slots hold anything."""
    slots = max(slots, *(new for _, _, new in rows))
    token_ids = torch.randint(0, 100, (len(rows), slots))
    taps = torch.randn(len(rows), slots, *rows[0][1].shape[1:])
    for row, (ids, known, new) in enumerate(rows):
        token_ids[row, :new] = torch.tensor(ids[-new:])
        taps[row, :new] = known[len(ids) - 1 - new : len(ids) - 1]
    lengths = torch.tensor([len(ids) - 1 for ids, _, _ in rows])
    return Emitted(token_ids, torch.tensor([new for _, _, new in rows]), taps, lengths)


def filled(proposer: EagleProposer, slot: int, ids: list[int], known: torch.Tensor) -> None:
    proposer.fill(slot, torch.tensor(ids), known[: len(ids)], torch.arange(len(ids)))


def proposed(draft: DraftModel, shape: TreeShape, ids: list[int]) -> Trees:
    """The tree behind a text whose last token is the root."""
    proposer, known = EagleProposer(draft, shape, 1, CAPACITY), taps_of(ids)
    filled(proposer, 0, ids[:-1], known)
    new = emitted((ids, known, 1))
    proposer.follow(new, NUM_KEYS)
    return proposer.propose(new, shape.levels, NUM_KEYS)


def slow_state(draft: DraftModel, ids: list[int], path: list[int]) -> torch.Tensor:
    """f'' after the tokens `ids` and then the drafted `path`, one row at a time on a cache of its own."""
    cache, fused = DraftCache(draft, 1), draft.fuse(taps_of(ids))
    cache.reserve(CAPACITY)

    def step(token: int, hidden: torch.Tensor, row: int) -> torch.Tensor:
        cache.open(torch.tensor([[row]]), row + 1)
        return draft.step(torch.tensor([[token]]), hidden, torch.tensor([[row]]), cache)

    for row in range(len(ids) - 1):
        hidden = step(ids[row + 1], fused[None, row : row + 1], row)
    for offset, token in enumerate(path):
        hidden = step(token, draft.feedback(hidden), len(ids) - 1 + offset)
    return hidden[0]


def slow_tree(draft: DraftModel, ids: list[int], shape: TreeShape) -> set[tuple[int, ...]]:
    """The selected paths below the root, by the definition."""

    def children(path: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        log_probs = draft.logits(slow_state(draft, ids, list(path)))[0].log_softmax(-1)
        best = log_probs.topk(min(shape.top_k, len(log_probs)))
        tokens = draft.target_ids(best.indices).tolist()
        return [((*path, token), value) for token, value in zip(tokens, best.values.tolist(), strict=True)]

    candidates = level = children(())
    for _ in range(shape.depth):
        beam = sorted(level, key=lambda item: -item[1])[: shape.top_k]
        level = [(path, score + more) for parent, score in beam for path, more in children(parent)]
        candidates = candidates + level
    return {path for path, _ in sorted(candidates, key=lambda item: -item[1])[: shape.total_token - 1]}


def paths_of(trees: Trees, row: int = 0) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, trees.num_nodes):
        paths.append((*paths[trees.parents[row, node]], int(trees.token_ids[row, node])))
        assert trees.levels[row, node] == len(paths[node]) and trees.parents[row, node] < node
    assert len(set(paths)) == len(paths)
    return set(paths[1:])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("eagle31", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tree_is_the_definitions(shape, eagle31, layers):
    draft, ids = tiny_draft(tiny_target("llama"), eagle31=eagle31, num_layers=layers), prompt(9)
    with torch.inference_mode():
        trees = proposed(draft, shape, ids)
        assert trees.token_ids[0, 0] == ids[-1]
        assert paths_of(trees) == slow_tree(draft, ids, shape)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_round_after_round_is_each_text_alone(shape, window, layers):
    """Ragged sequences, rounds of different lengths, a tree in between that leaves no trace, a sequence that moves."""
    draft = tiny_draft(
        tiny_target("llama"), eagle31=shape.depth == 3, num_layers=layers, sliding_window=window
    )  # fmt: skip
    texts = [prompt(length + 8, seed=length) for length in (9, 2, 14)]
    ends = [9, 2, 14]
    with torch.inference_mode():
        known = [taps_of(ids) for ids in texts]
        proposer = EagleProposer(draft, shape, 3, CAPACITY)
        for slot, ids in enumerate(texts):
            filled(proposer, slot, ids[: ends[slot]], known[slot])
        for new in ((1, 1, 1), (3, 1, 2), (2, 3, 1)):
            ends = [end + count for end, count in zip(ends, new, strict=True)]
            rows = [(ids[:end], taps, count) for ids, end, taps, count in zip(texts, ends, known, new, strict=True)]
            round_ = emitted(*rows, slots=max(shape.levels + 1, 3))
            proposer.follow(round_, NUM_KEYS)
            trees = proposer.propose(round_, shape.levels, NUM_KEYS)
            for row, ids in enumerate(texts):
                alone = proposed(draft, shape, ids[: ends[row]])
                assert torch.equal(trees.token_ids[row], alone.token_ids[0]), (new, row)
                assert torch.equal(trees.parents[row], alone.parents[0])
        proposer.move(2, 0)
        proposer.reserve(2 * CAPACITY)
        last = emitted((texts[2][: ends[2] + 1], known[2], 1), slots=shape.levels + 1)
        proposer.follow(last, NUM_KEYS)
        alone = proposed(draft, shape, texts[2][: ends[2] + 1])
        assert torch.equal(proposer.propose(last, shape.levels, NUM_KEYS).token_ids, alone.token_ids)


def test_a_window_and_a_forgotten_prompt_show():
    """Negative controls: without the window, or without the tokens before, the tree is another."""
    draft, ids = tiny_draft(tiny_target("llama")), prompt(14)
    with torch.inference_mode():
        whole = paths_of(proposed(draft, TreeShape(12, 3, 3), ids))
        draft.config = dataclasses.replace(draft.config, sliding_window=4)
        assert paths_of(proposed(draft, TreeShape(12, 3, 3), ids)) != whole
        draft.config = dataclasses.replace(draft.config, sliding_window=None)
        assert paths_of(proposed(draft, TreeShape(12, 3, 3), ids[7:])) != whole


def test_a_head_that_overflows_gives_a_well_formed_tree():
    draft = tiny_draft(tiny_target("llama"))
    draft.lm_head.weight[3] = float("nan")
    draft.lm_head.weight[5] = float("inf")
    with torch.inference_mode():
        assert len(paths_of(proposed(draft, TreeShape(12, 3, 4), prompt(4)))) == 11


def test_the_draft_cache():
    draft = tiny_draft(tiny_target("llama"))
    cache = DraftCache(draft, 2)
    cache.reserve(6)
    heads, dim = draft.config.num_key_value_heads, draft.config.head_dim

    def rows(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, :, None].expand(-1, heads, -1, dim)

    for slot, known in enumerate(([1, 2, 3], [4])):
        states = rows([known])[0].transpose(0, 1)
        cache.fill(slot, [(states, states)])
    cache.open(torch.tensor([[3, 4], [1, 2]]), 5)
    for states in cache.update(rows([[5, 6], [7, 8]]), rows([[5, 6], [7, 8]])):
        assert (states == states[:, :1, :, :1]).all()
        assert states[:, 0, :, 0].tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 0, 0]]
    cache.reserve(8)
    cache.move(0, 1)
    cache.open(torch.tensor([[3]]), 4)
    assert cache.update(rows([[9]]), rows([[9]]))[0][0, 0, :, 0].tolist() == [1, 2, 3, 9] and cache.capacity == 8
