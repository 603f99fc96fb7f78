"""One forward of a tree is one forward per path; a compacted cache is a recomputed one. Over the table of targets."""

import pytest
import torch
from tiny import NAMES, prompt, tiny_target
from tree_rounds import keep_path, verify_one

from fledge.decoding.cache import TargetCache
from fledge.decoding.masks import Kind
from fledge.decoding.verifier import AttentionVerifier
from fledge.drafters.tree import Trees, ancestors_of
from fledge.target.model import Target

PARENTS = [0, 0, 0, 0, 1, 1, 2, 4, 4, 7, 9, 9]
LEVELS = [0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5]
TOLERANCE = 2e-5
WINDOWED = [name for name in NAMES if name in ("qwen2", "gemma2", "gemma3", "gpt_oss", "cohere2", "mistral")]


def tree_of(seed: int) -> Trees:
    parents = torch.tensor([PARENTS])
    token_ids = torch.tensor([prompt(len(PARENTS), seed)])
    return Trees(token_ids, parents, torch.tensor([LEVELS]), ancestors_of(parents, max(LEVELS)))


def path_to(node: int) -> list[int]:
    return [0] if node == 0 else [*path_to(PARENTS[node]), node]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tree_error(target: Target, *, tree: Trees | None = None) -> float:
    """The largest error of states and taps over two rounds: a tree, one of its paths kept, a tree behind it."""
    ids, verifier = prompt(10), AttentionVerifier(target, 1, 64)
    found: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []  # tokens up to a row, its state, its taps
    with verifier.running():
        prefill = verifier.prefill(slice(0, 1), torch.tensor([ids]), taps=True)
        found.append((ids, prefill.last_hidden[0, -1], prefill.tap_hidden[0, -1]))
        for kept, seed in ((10, 1), (None, 2)):
            nodes = tree or tree_of(seed)
            output = verify_one(verifier, nodes, len(ids))
            for node in range(len(PARENTS)):
                tokens = ids + nodes.token_ids[0, path_to(node)].tolist()
                found.append((tokens, output.last_hidden[0, node], output.tap_hidden[0, node]))
            if kept is not None:
                keep_path(verifier, path_to(kept), len(ids))
                ids = ids + nodes.token_ids[0, path_to(kept)].tolist()
    worst = 0.0  # outside the session: the reference is the stock model with its own masks and attention
    for tokens, last_hidden, tap_hidden in found:
        expected = target.forward(torch.tensor([tokens]))
        worst = max(worst, relative_error(last_hidden, expected.last_hidden[0, -1]))
        worst = max(worst, relative_error(tap_hidden, expected.tap_hidden[0, -1]))
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_its_paths_and_compaction_is_recomputation(name):
    assert tree_error(tiny_target(name)) < TOLERANCE


@pytest.mark.parametrize("name", WINDOWED)
def test_a_dropped_window_is_found(name, monkeypatch):
    monkeypatch.setattr(Kind, "reaches_back", lambda self, last_position: True)
    assert tree_error(tiny_target(name)) > 100 * TOLERANCE


def test_a_chain_mask_on_a_tree_is_found():
    nodes = tree_of(1)
    chain = torch.ones_like(nodes.ancestors).tril()
    wrong = Trees(nodes.token_ids, nodes.parents, nodes.levels, chain)
    assert tree_error(tiny_target("llama"), tree=wrong) > 100 * TOLERANCE


def test_a_wrong_compaction_is_found(monkeypatch):
    monkeypatch.setattr(TargetCache, "compact", lambda self, lengths, path: None)  # the rows stay where they are
    assert tree_error(tiny_target("llama")) > 100 * TOLERANCE


def test_a_cache_grows_and_serves_again():
    """One verifier, prompts of growing and shrinking length: nothing of an earlier one is left."""
    target = tiny_target("gemma3")
    verifier = AttentionVerifier(target, 2, 8)
    for length, capacity in ((5, 16), (30, 64), (7, 64)):
        ids = prompt(length)
        with verifier.running():
            verifier.reserve(capacity)
            found = verifier.prefill(slice(1, 2), torch.tensor([ids]), taps=False).last_hidden
        assert relative_error(found, target.forward(torch.tensor([ids])).last_hidden) < TOLERANCE
