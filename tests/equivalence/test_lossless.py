"""Greedy speculative decoding emits exactly what plain decoding emits, whatever the head proposes.

Every tiny target, every kind of head, every kind of tree, prompts in turn on the same caches.
"""

import functools
from dataclasses import replace

import pytest
import torch
from tiny import EOS, NAMES, ScriptedDraft, prompt, tiny_draft, tiny_model, tiny_target

from fledge.decoding import round
from fledge.decoding.accept import accept
from fledge.decoding.adaptive import AdaptiveBudget
from fledge.decoding.generate import Generation, Sampling, TreeShape, generate
from fledge.errors import UserError
from fledge.target.model import Target

GREEDY = Sampling()
NEW = 10
PROMPTS = (1, 20, 5)  # lengths
TREES = (
    TreeShape(60, 7, 10), TreeShape(60, 5, 10), TreeShape(32, 8, 4), TreeShape(6, 4, 1), TreeShape(8, 0, 10),
    TreeShape(4, 3, 10), TreeShape(1, 5, 10),
)  # fmt: skip
HEADS = ("random", "zero", "adversarial", "every third token wrong")


@functools.cache
def plain(name: str, length: int, new: int = NEW) -> Generation:
    return generate(
        tiny_target(name), None, prompt(length), max_new_tokens=new, sampling=GREEDY, eos_token_ids=(), trace=True
    )


def half_right(target: Target, ids: list[int], answer: list[int]) -> ScriptedDraft:
    return ScriptedDraft(target, ids + answer, wrong=3)


def check_books(found: Generation, tree: TreeShape) -> None:
    """Every count of a generation, recomputed from its trace."""
    assert found.rounds is not None
    emitted = [found.token_ids[0]]
    for round_, kept in zip(found.rounds, found.accepted, strict=True):
        assert round_.token_ids[0] == emitted[-1] and round_.accepted[0] == 0
        assert 1 <= len(round_.token_ids) <= tree.total_token
        assert all(0 <= parent < node for node, parent in enumerate(round_.parents) if node)
        siblings = list(zip(round_.parents, round_.token_ids, strict=True))[1:]
        assert len(set(siblings)) == len(siblings)
        for parent, node in zip(round_.accepted, round_.accepted[1:], strict=False):
            assert round_.parents[node] == parent
        new = [round_.token_ids[node] for node in round_.accepted[1:]]
        new += [] if round_.bonus is None else [round_.bonus]
        assert kept == len(new) - 1 and len(new) <= tree.depth + 2
        emitted += new
    assert emitted == found.token_ids
    assert found.num_forwards == len(found.accepted)
    assert len(found.token_ids) == 1 + sum(found.accepted) + found.num_forwards
    assert found.drafted_depth == min(tree.depth + 1, tree.total_token - 1)
    if found.num_forwards:
        assert found.tau == pytest.approx(1 + sum(found.accepted) / found.num_forwards)


@pytest.mark.parametrize("name", NAMES)
def test_speculative_is_plain(name):
    target = tiny_target(name)
    heads = {kind: tiny_draft(target, kind) for kind in HEADS[:3]}
    turn = 0
    for kind in HEADS:
        for tree in TREES:
            ids = prompt(PROMPTS[turn % 3])
            expected = plain(name, len(ids)).token_ids
            head = heads.get(kind) or half_right(target, ids, expected)
            found = generate(
                target, head, ids, tree=tree, max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=(), trace=True
            )
            assert found.token_ids == expected, (kind, tree, len(ids))
            assert found.finish_reason == "length"
            check_books(found, tree)
            turn += 1


@pytest.mark.parametrize("name", NAMES)
def test_plain_is_the_librarys_generate(name):
    """Windows are smaller than these sequences, so a wrong window or position shows."""
    target = tiny_target(name)
    ids = torch.tensor([prompt(20)])
    theirs = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    found = plain(name, 20, 24)
    assert found.token_ids == theirs[0, 20:].tolist()
    assert len(set(found.token_ids)) > 4, "a repeated token would prove little"
    assert (found.accepted, found.drafted_depth, found.num_forwards, found.tau) == ([], 0, 23, 1.0)
    assert [round_.bonus for round_ in found.rounds] == found.token_ids[1:]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_an_adaptive_tree_is_lossless(name):
    """Rounds of every kind: plain ones, short and full trees, what the text repeats; the head follows what it did not
    draft. The last target's layers keep a running state, which follows chains."""
    target, ids = tiny_target(name), prompt(8)
    answer = plain(name, 8, 30).token_ids
    heads = (tiny_draft(target, "random"), half_right(target, ids, answer), ScriptedDraft(target, ids + answer))
    kinds = set()
    for head in heads:
        budget = AdaptiveBudget(
            plain_s=1.0, verify_s={1: 1.0, 60: 1.5}, draft_s={n: 0.05 * n for n in range(1, 7)}, overhead_s=0.1
        )
        for length in (8, 5):
            found = generate(
                target, head, prompt(length), tree=TreeShape(60, 5, 4), max_new_tokens=30, sampling=GREEDY,
                eos_token_ids=(), trace=True, budget=budget,
            )  # fmt: skip
            assert found.token_ids == plain(name, length, 30).token_ids
            kinds |= {len(round_.token_ids) for round_ in found.rounds or ()}
    assert 1 in kinds and len(kinds) > 3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_head_that_is_always_right_fills_every_round(name):
    target, ids = tiny_target(name), prompt(8)
    answer = plain(name, 8, 30).token_ids
    for tree, length in ((TreeShape(60, 5, 10), 7), (TreeShape(6, 4, 1), 6), (TreeShape(4, 5, 1), 4)):
        found = generate(
            target, ScriptedDraft(target, ids + answer), ids, tree=tree, max_new_tokens=1 + 3 * length, sampling=GREEDY,
            eos_token_ids=(), trace=True,
        )  # fmt: skip
        assert found.token_ids == answer[: 1 + 3 * length]
        assert found.accepted == [length - 1] * 3 and found.tau == length
        check_books(found, tree)


@pytest.mark.parametrize("limit", range(1, 15))
def test_the_limit_cuts_mid_tree(limit):
    target, ids = tiny_target("llama"), prompt(8)
    answer = plain("llama", 8, 30).token_ids
    found = generate(
        target, ScriptedDraft(target, ids + answer), ids, tree=TreeShape(60, 5, 10), max_new_tokens=limit,
        sampling=GREEDY, eos_token_ids=(), trace=True,
    )  # fmt: skip
    assert found.token_ids == answer[:limit] and found.finish_reason == "length"
    check_books(found, TreeShape(60, 5, 10))


@pytest.mark.parametrize("position", range(0, 9))
def test_eos_cuts_mid_tree(position):
    """Nothing follows the first EOS, wherever in a round it falls; lists of EOS ids count."""
    target, ids = tiny_target("llama"), prompt(8)
    answer = plain("llama", 8, 30).token_ids
    first = answer.index(answer[position])
    stops = (127 if 127 not in answer else 126, answer[position])
    arguments = dict(max_new_tokens=30, sampling=GREEDY, eos_token_ids=stops, trace=True)
    found = generate(target, ScriptedDraft(target, ids + answer), ids, tree=TreeShape(60, 5, 10), **arguments)
    alone = generate(target, None, ids, **arguments)
    assert found.token_ids == alone.token_ids == answer[: first + 1]
    assert found.finish_reason == alone.finish_reason == "stop"
    check_books(found, TreeShape(60, 5, 10))


def test_eos_defaults_to_the_targets():
    target, ids = tiny_target("llama"), prompt(8)
    script = ScriptedDraft(target, ids + plain("llama", 8, 30).token_ids)
    stop = plain("llama", 8, 30).token_ids[4]
    target.model.generation_config.eos_token_id = [EOS, stop]
    try:
        one = generate(target, None, ids, max_new_tokens=30, sampling=GREEDY)
        two = generate(target, script, ids, tree=TreeShape(), max_new_tokens=30, sampling=GREEDY)
    finally:
        target.model.generation_config.eos_token_id = EOS
    assert one.token_ids[-1] == two.token_ids[-1] == stop and one.token_ids == two.token_ids


def test_positions_end_the_generation_cleanly():
    model = tiny_model("qwen3", max_position_embeddings=24)
    target = Target(model, tap_layers=(1, 2, 3), name="short")
    ids = prompt(20)
    arguments = dict(max_new_tokens=50, sampling=GREEDY, eos_token_ids=())
    one = generate(target, None, ids, **arguments)
    two = generate(target, tiny_draft(target), ids, tree=TreeShape(), **arguments)
    assert one.token_ids == two.token_ids and len(one.token_ids) == 4 and one.finish_reason == "length"
    with pytest.raises(UserError, match="the prompt has 24 tokens, but short has 24 positions"):
        generate(target, None, prompt(24), **arguments)


def test_streams_what_it_returns():
    target, pieces = tiny_target("llama"), []
    found = generate(
        target, tiny_draft(target), prompt(8), tree=TreeShape(), max_new_tokens=12, sampling=GREEDY,
        on_tokens=pieces.append,
    )  # fmt: skip
    assert sum(pieces, []) == found.token_ids and len(pieces) == 1 + found.num_forwards


def test_phases_add_up():
    target = tiny_target("llama")
    found = generate(target, tiny_draft(target), prompt(8), tree=TreeShape(), max_new_tokens=12, sampling=GREEDY)
    assert list(found.phases_s) == ["prefill", "draft", "verify", "accept", "other"]
    assert found.ttft_s == found.phases_s["prefill"] and min(found.phases_s.values()) > 0
    assert found.decode_s == pytest.approx(sum(found.phases_s.values()) - found.ttft_s)


@pytest.mark.parametrize(
    "ids, change, message",
    [
        ([], {}, "the prompt has no tokens"),
        ([5, 128], {}, r"token id 128, but tiny-llama has ids 0\.\.127"),
        ([5, -1], {}, "token id -1"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_bad_calls_are_user_errors(ids, change, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_target("llama"), None, ids, **{"max_new_tokens": 4, "sampling": GREEDY, **change})


def test_a_head_with_other_taps_is_refused():
    """The most repeated serving bug: the same ids, one layer apart, decode "fine" at an acceptance near zero."""
    target = tiny_target("llama")
    other = Target(tiny_model("llama"), tap_layers=(1, 3, 4), name="other")
    with pytest.raises(UserError, match=r"tap layers \[1, 3, 4\], the target taps \[2, 4, 5\]"):
        generate(target, tiny_draft(other), [5], tree=TreeShape(), max_new_tokens=4, sampling=GREEDY)


def test_this_file_notices_a_wrong_rule(monkeypatch):
    """Accepting the draft's favourite unseen changes the output: the comparison above is not vacuous."""

    def credulous(trees, logits, *more, **options):
        accepted = accept(trees, logits, *more, **options)
        return accepted if trees.num_nodes == 1 else replace(accepted, token_ids=trees.token_ids[:, 1:2])

    monkeypatch.setattr(round, "accept", credulous)
    target, ids = tiny_target("llama"), prompt(20)
    found = generate(
        target, tiny_draft(target), ids, tree=TreeShape(), max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=()
    )
    assert found.token_ids != plain("llama", 20).token_ids
