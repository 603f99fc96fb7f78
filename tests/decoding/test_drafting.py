"""The drafter against drafting without a cache, without a beam mask and without tensors: path by path, node by node."""

import pytest
import torch
from tiny import prompt, tiny_draft, tiny_target

from fledge.decoding.cache import DraftCache
from fledge.decoding.drafting import Drafter
from fledge.decoding.records import TreeShape
from fledge.draft.model import DraftModel

CAPACITY = 40


def features(draft: DraftModel, ids: list[int]) -> torch.Tensor:
    output = tiny_target("llama").forward(torch.tensor([ids]))
    return draft.fuse(output.tap_hidden[0].clone())


def fresh_cache(draft: DraftModel) -> DraftCache:
    config = draft.config
    return DraftCache(config.num_key_value_heads, config.head_dim, CAPACITY, torch.float32, torch.device("cpu"))


def slow_state(draft: DraftModel, ids: list[int], path: list[int]) -> torch.Tensor:
    """f'' after the tokens `ids` and then the drafted `path`, one row at a time on a cache of its own."""
    cache, fused = fresh_cache(draft), features(draft, ids)
    for row in range(len(ids) - 1):
        hidden = draft.step(torch.tensor([[ids[row + 1]]]), fused[None, row : row + 1], torch.tensor([[row]]), cache)
    for offset, token in enumerate(path):
        position = torch.tensor([[len(ids) - 1 + offset]])
        hidden = draft.step(torch.tensor([[token]]), draft.feedback(hidden), position, cache)
    return hidden[0]


def slow_tree(draft: DraftModel, ids: list[int], shape: TreeShape) -> dict[tuple[int, ...], float]:
    """The selected paths below the root and their scores, by the definition."""

    def children(path: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        log_probs = draft.logits(slow_state(draft, ids, list(path)))[0].log_softmax(-1)
        best = log_probs.topk(min(shape.top_k, len(log_probs)))
        tokens = draft.target_ids(best.indices).tolist()
        return [((*path, token), value) for token, value in zip(tokens, best.values.tolist(), strict=True)]

    candidates = children(())
    level = candidates
    for _ in range(shape.depth):
        beam = sorted(level, key=lambda item: -item[1])[: shape.top_k]
        level = [(path, score + more) for parent, score in beam for path, more in children(parent)]
        candidates = candidates + level
    best = sorted(candidates, key=lambda item: -item[1])[: shape.total_token - 1]
    return dict(best)


def paths_of(tree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], int(tree.token_ids[node])))
        assert tree.levels[node] == len(paths[node]) and tree.parents[node] < node
    assert len(set(paths)) == len(paths)
    return set(paths[1:])


@pytest.mark.parametrize("eagle31", [False, True])
@pytest.mark.parametrize(
    "shape", [TreeShape(12, 3, 3), TreeShape(6, 4, 1), TreeShape(9, 0, 5), TreeShape(3, 3, 10), TreeShape(60, 2, 4)]
)
def test_the_tree_is_the_definitions(shape, eagle31):
    draft = tiny_draft(tiny_target("llama"), eagle31=eagle31)
    ids = prompt(9)
    with torch.inference_mode():
        drafter = Drafter(draft, shape, CAPACITY)
        hidden = drafter.extend(torch.tensor(ids[1:]), features(draft, ids)[:-1])
        tree = drafter.grow(torch.tensor(ids[-1:]), hidden, shape.levels)
        expected = slow_tree(draft, ids, shape)
    assert tree.token_ids[0] == ids[-1]
    assert paths_of(tree) == set(expected)


def test_extending_in_pieces_is_extending_at_once():
    """Rounds add a few tokens each, and a tree in between leaves no trace in the cache."""
    draft = tiny_draft(tiny_target("llama"))
    ids, shape = prompt(12), TreeShape(10, 2, 3)
    with torch.inference_mode():
        tokens, fused = torch.tensor(ids[1:]), features(draft, ids)[:-1]
        whole = Drafter(draft, shape, CAPACITY).extend(tokens, fused)
        pieces = Drafter(draft, shape, CAPACITY)
        for start, end in ((0, 5), (5, 6), (6, 11)):
            found = pieces.extend(tokens[start:end], fused[start:end])
            pieces.grow(tokens[end - 1 : end], found, 3)
        forgetful = Drafter(draft, shape, CAPACITY)
        wrong = forgetful.extend(tokens[5:], fused[5:])
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wrong, whole, atol=1e-3)


def test_a_head_that_overflows_gives_a_well_formed_tree():
    draft = tiny_draft(tiny_target("llama"))
    draft.lm_head.weight[3] = float("nan")
    draft.lm_head.weight[5] = float("inf")
    ids = prompt(4)
    with torch.inference_mode():
        drafter = Drafter(draft, TreeShape(12, 3, 4), CAPACITY)
        tree = drafter.grow(torch.tensor(ids[-1:]), drafter.extend(torch.tensor(ids[1:]), features(draft, ids)[:-1]), 4)
    assert len(paths_of(tree)) == 11
