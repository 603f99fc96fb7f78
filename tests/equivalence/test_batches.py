"""Batches emit what plain decoding of each prompt alone emits: ragged lengths, both shape policies, buckets and all.

Buckets are 16 rows here, so that generations of some 30 rows pass through several.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from batching import (
    CASES,
    NEW,
    PENALTY,
    POLICIES,
    RAGGED,
    TREE,
    batch,
    drafter_of,
    opened,
    plain,
    script,
)
from tiny import HYBRIDS, NAMES, VOCAB, ScriptedDraft, prompt, tiny_draft, tiny_model, tiny_target

from fledge.decoding import generate as module
from fledge.decoding import round
from fledge.decoding.accept import accept
from fledge.decoding.attention import NAME
from fledge.decoding.cache import TargetCache
from fledge.decoding.generate import generate, generate_batch, open_session, stream, uses_fixed_shapes
from fledge.decoding.masks import Masks
from fledge.decoding.records import Generation, Sampling
from fledge.decoding.requests import Request
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

pytestmark = pytest.mark.usefixtures("small_buckets")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_prompt_alone(name):
    for shapes in POLICIES:
        for kind, tree, lengths in CASES:
            found = batch(name, drafter_of(kind, name, lengths), lengths, tree, shapes=shapes)
            for length, one in zip(lengths, found, strict=True):
                assert one.token_ids == plain(name, length), (shapes, kind, tree, lengths, length)
                check_books(one, tree if kind else None)


def check_books(one: Generation, tree: TreeShape | None) -> None:
    assert one.finish_reason == "length"
    assert one.drafted_depth == (tree.levels if tree else 0)
    if tree:
        assert len(one.token_ids) == 1 + sum(one.accepted) + one.num_forwards and one.num_forwards == len(one.accepted)
        assert all(0 <= kept <= tree.levels for kept in one.accepted)
    else:
        assert one.num_forwards == len(one.token_ids) - 1 and not one.accepted
    assert list(one.phases_s) == ["prefill", "draft", "verify", "accept", "other"]
    assert one.decode_s == pytest.approx(sum(one.phases_s.values()) - one.ttft_s)


@pytest.mark.parametrize("shapes", POLICIES)
@pytest.mark.parametrize("wrong", [0, 2, 3, 5])
def test_rounds_accept_what_each_prompt_alone_would(wrong, shapes):
    target, lengths, tree = tiny_target("llama"), (8, 3, 20), TreeShape(20, 3, 4)
    scripts = [script("llama", length, 31) for length in lengths]
    drafter = ScriptedDraft(target, *scripts, wrong=wrong)
    found = batch("llama", drafter, lengths, tree, max_new_tokens=31, shapes=shapes)
    for length, its_script, one in zip(lengths, scripts, found, strict=True):
        alone = generate(
            target, ScriptedDraft(target, its_script, wrong=wrong), prompt(length), tree=tree, max_new_tokens=31,
            eos_token_ids=(), shapes="exact",
        )  # fmt: skip
        assert one.token_ids == alone.token_ids
        assert one.accepted[:-1] == alone.accepted[:-1]  # alone, the last tree is as deep as there is room
    assert wrong or found[0].accepted == [4] * 6


@pytest.mark.parametrize("limit", range(1, 10))
def test_the_limit_cuts_mid_tree(limit):
    target, lengths = tiny_target("llama"), (8, 3)
    drafter = ScriptedDraft(target, script("llama", 8), script("llama", 3))
    for shapes in POLICIES:
        found = batch("llama", drafter, lengths, TreeShape(60, 5, 10), max_new_tokens=limit, shapes=shapes)
        assert [one.token_ids for one in found] == [plain("llama", length)[:limit] for length in lengths]


@pytest.mark.parametrize("position", range(0, 8))
def test_sequences_end_at_their_own_stop_tokens(position):
    """The first ends in mid-tree, wherever that is; the others go on and are not disturbed."""
    target, lengths = tiny_target("llama"), (8, 3, 20)
    expected = [plain("llama", length, 30) for length in lengths]
    stop = expected[0][position]
    drafter = ScriptedDraft(target, *(script("llama", length, new=30) for length in lengths))
    for shapes, one_drafter in itertools.product(POLICIES, (drafter, None)):
        options = {"max_new_tokens": 30, "eos_token_ids": (stop, 999), "shapes": shapes}
        found = batch("llama", one_drafter, lengths, TreeShape(60, 5, 10), **options)
        for answer, one in zip(expected, found, strict=True):
            ends = answer.index(stop) + 1 if stop in answer else 30
            assert one.token_ids == answer[:ends]
            assert one.finish_reason == ("stop" if stop in answer else "length")


def test_positions_end_each_sequence_cleanly():
    """Nodes past the last position are computed and never emitted."""
    target = Target(tiny_model("qwen3", max_position_embeddings=24), tap_layers=(1, 2, 3), name="short")
    options = {"max_new_tokens": 50, "target": target}
    for shapes in POLICIES:
        found = batch("qwen3", tiny_draft(target), (20, 5), TreeShape(60, 7, 4), shapes=shapes, **options)
        assert [len(one.token_ids) for one in found] == [4, 19]
        for length, one in zip((20, 5), found, strict=True):
            alone = generate(target, None, prompt(length), max_new_tokens=50, eos_token_ids=())
            assert one.token_ids == alone.token_ids
    with pytest.raises(UserError, match="the prompt has 24 tokens"):
        batch("qwen3", None, (24, 5), target=target)


@pytest.mark.parametrize("shapes", POLICIES)
def test_a_session_serves_again(shapes):
    """Long, then short, then another batch: nothing of an earlier one is left."""
    target = tiny_target("gemma3")
    drafter = tiny_draft(target)
    for lengths in ((20, 5), (1, 5), (5, 20), (20, 20, 1)):
        found = batch("gemma3", drafter, lengths, TreeShape(12, 3, 3), shapes=shapes)
        assert [one.token_ids for one in found] == [plain("gemma3", length) for length in lengths]
    assert len(module._sessions[target]) <= module.KEPT_SESSIONS


@pytest.mark.parametrize("shapes", POLICIES)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_finished_sequence_makes_room_for_the_next(batch_size, shapes):
    """Sequences join and leave at different times; places are taken over, caches grow."""
    told: list[tuple[int, list[int]]] = []
    lengths, target = (20, 1, 5, 9, 30, 2), tiny_target("llama")
    drafter = ScriptedDraft(target, *(script("llama", length) for length in lengths), wrong=3)
    for one_drafter in (None, drafter):
        told.clear()
        found = batch(
            "llama", one_drafter, lengths, TreeShape(20, 3, 4), batch_size=batch_size, shapes=shapes,
            on_tokens=lambda row, new: told.append((row, new)),
        )  # fmt: skip
        assert [one.token_ids for one in found] == [plain("llama", length) for length in lengths]
        for row, one in enumerate(found):
            assert list(itertools.chain(*(new for which, new in told if which == row))) == one.token_ids


@pytest.mark.parametrize("shapes", POLICIES)
def test_a_cancelled_request_leaves_and_the_others_go_on(shapes):
    """One that waits, and one that is being answered; their slots are free for the next."""
    lengths, target = (20, 1, 5, 9), tiny_target("llama")
    shared = opened("llama", tiny_draft(target), lengths, shapes=shapes, batch_size=2, eos_token_ids=())
    states = list(shared.waiting)
    while len(states[0].token_ids) < 3:
        shared.step()
    shared.cancel(states[0])
    shared.cancel(states[3])
    shared.run()
    assert [state.token_ids for state in states[1:3]] == [plain("llama", length) for length in (1, 5)]
    assert states[0].token_ids == plain("llama", 20)[: len(states[0].token_ids)] and states[0].room > 0
    assert not states[3].token_ids and shared.idle


def test_requests_of_several_laws_share_a_session():
    """Each draws as it does alone: greedy, warm, with a seed of its own."""
    target = tiny_target("llama")
    laws = [Sampling(), Sampling(1.0, seed=3), Sampling(0.6, 0.9, seed=4), Sampling(1.0, seed=5),
            Sampling(repetition_penalty=0.3), Sampling(1.0, seed=6, min_p=0.2, repetition_penalty=1.3)]  # fmt: skip
    drafter, options = tiny_draft(target), dict(tree=TreeShape(12, 3, 3), eos_token_ids=())
    alone = [generate(target, drafter, prompt(8), max_new_tokens=NEW, sampling=law, **options) for law in laws]
    requests = [Request(prompt(8), NEW, law) for law in laws]
    shared = open_session(target, drafter, requests, batch_size=3, **options)
    states = [shared.add(request) for request in requests]
    shared.run()
    assert [state.token_ids for state in states] == [one.token_ids for one in alone]
    assert len({tuple(state.token_ids) for state in states}) == len(laws)


@functools.cache
def generated(name: str, length: int) -> list[int]:
    """What transformers itself says under the penalty."""
    found = tiny_target(name).model.generate(
        torch.tensor([prompt(length)]), max_new_tokens=24, do_sample=False, eos_token_id=VOCAB, pad_token_id=0,
        repetition_penalty=PENALTY.repetition_penalty,
    )  # fmt: skip
    return found[0, length:].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen2"])
def test_greedy_with_a_repetition_penalty_is_transformers(name):
    """Plain, as trees and chains of any drafter, in batches of both shape policies; sequences join and leave."""
    target, options = tiny_target(name), dict(max_new_tokens=24, eos_token_ids=())
    right = ScriptedDraft(target, *(prompt(length) + generated(name, length) for length in RAGGED), wrong=4)
    ways = [
        (None, TREE), (tiny_draft(target), TreeShape(12, 3, 3)), (tiny_draft(target, "adversarial"), TREE),
        (right, TreeShape(20, 4, 3)), (right, TreeShape(6, 4, 1)), (PromptLookup(), TreeShape(8, 6, 1)),
    ]  # fmt: skip
    for (drafter, tree), shapes in itertools.product(ways, POLICIES):
        if isinstance(drafter, PromptLookup) and shapes == "fixed":
            continue
        found = batch(name, drafter, RAGGED, tree, shapes=shapes, sampling=PENALTY, batch_size=2, **options)
        assert [one.token_ids for one in found] == [generated(name, length) for length in RAGGED], (drafter, shapes)
        if drafter is right:
            assert max(max(one.accepted) for one in found) >= 3, "paths of several tokens were put to the test"
    assert generated(name, 20) != plain(name, 20, 24), "the penalty matters"


def test_chains_of_running_states_keep_the_penalty():
    target = Target(tiny_model("lfm2"), tap_layers=(1, 2, 3), name="hybrid")
    options = dict(max_new_tokens=20, eos_token_ids=(), sampling=PENALTY)
    expected = generate(target, None, prompt(8), **options).token_ids
    drafter = ScriptedDraft(target, prompt(8) + expected, wrong=4)
    found = generate(target, drafter, prompt(8), tree=TreeShape(6, 4, 1), **options)
    assert found.token_ids == expected and max(found.accepted) >= 3
    assert expected != generate(target, None, prompt(8), max_new_tokens=20, eos_token_ids=()).token_ids


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("warm", [Sampling(1.0, seed=7), Sampling(0.9, 0.95, seed=7, repetition_penalty=1.2)])
def test_a_seed_gives_one_text_however_it_is_decoded(name, warm):
    """Plain, as a tree, as a chain, by prompt lookup, alone, in a batch, in fixed shapes: the same draws."""
    target = tiny_target(name)
    options = dict(max_new_tokens=24, sampling=warm, eos_token_ids=())
    expected = generate(target, None, prompt(8), **options).token_ids
    ways = [(tiny_draft(target), TreeShape(12, 3, 3)), (tiny_draft(target, "adversarial"), TreeShape(5, 4, 1)),
            (PromptLookup(), TreeShape(8, 6, 1)), (ScriptedDraft(target, prompt(8) + expected), TREE)]  # fmt: skip
    prompts = [prompt(8), prompt(3), prompt(8)]
    for drafter, tree in ways:
        assert generate(target, drafter, prompt(8), tree=tree, **options).token_ids == expected
        for shapes in POLICIES if not isinstance(drafter, PromptLookup) else ("exact",):
            many = generate_batch(target, drafter, prompts, tree=tree, shapes=shapes, **options)
            assert many[0].token_ids == expected != many[2].token_ids
    other = generate(target, None, prompt(8), **{**options, "sampling": replace(warm, seed=8)})
    assert other.token_ids != expected


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_is_plain_and_repeats_what_repeats(name):
    """A text that has begun to say again what it said: drafts are right, and the output is the target's."""
    target = tiny_target(name)
    said = plain(name, 20, 30)
    repeating = prompt(20) + said + prompt(20)
    options = dict(max_new_tokens=20, eos_token_ids=())
    for ids in (prompt(5), repeating):
        found = generate(target, PromptLookup(), ids, tree=TreeShape(8, 6, 1), **options)
        assert found.token_ids == generate(target, None, ids, **options).token_ids
        assert found.num_forwards == len(found.accepted)


@pytest.mark.parametrize("shapes", POLICIES)
def test_streams_rounds(shapes):
    target, lengths = tiny_target("llama"), (8, 3)
    drafter = ScriptedDraft(target, script("llama", 8), script("llama", 3))
    options = dict(tree=TreeShape(20, 3, 4), max_new_tokens=NEW, eos_token_ids=(), shapes=shapes)
    rounds = list(stream(target, drafter, [prompt(length) for length in lengths], **options))
    assert [sum(len(new[row]) for new in rounds) for row in (0, 1)] == [NEW, NEW]
    assert max(len(new) for pair in rounds for new in pair) == 5
    for row, length in enumerate(lengths):
        assert list(itertools.chain(*(new[row] for new in rounds))) == plain("llama", length)
    assert target.text_config._attn_implementation != NAME


def test_two_streams_at_once_and_one_that_is_left():
    """Each has a session of its own; leaving a stream early ends its requests and frees its session."""
    target, options = tiny_target("llama"), dict(max_new_tokens=NEW, eos_token_ids=())
    streams = [stream(target, None, [prompt(length)], **options) for length in (5, 8)]
    said: list[list[int]] = [[], []]
    for news in zip(*streams, strict=True):
        for mine, new in zip(said, news, strict=True):
            mine += new[0]
    assert said == [plain("llama", 5), plain("llama", 8)]
    third = stream(target, None, [prompt(20)], **options)
    next(third)
    third.close()
    assert generate(target, None, prompt(5), **options).token_ids == plain("llama", 5)


# -- negative controls -------------------------------------------------------------------------------------------------


def lazy_compaction(monkeypatch):
    monkeypatch.setattr(TargetCache, "compact", lambda self, lengths, path: None)


def one_length_for_all(monkeypatch):
    """What a batch without lengths of its own would see."""
    real = Masks.trees
    monkeypatch.setattr(
        Masks, "trees",
        lambda self, lengths, *args, **more: real(self, lengths.max().expand_as(lengths), *args, **more),
    )  # fmt: skip


def everything_accepted(monkeypatch):
    def credulous(trees, *args, **options):
        accepted = accept(trees, *args, **options)
        path = torch.zeros_like(accepted.path)
        path[:, 1:2] = 1
        count = torch.full_like(accepted.num_accepted, min(2, trees.num_nodes))
        return replace(accepted, path=path, num_accepted=count)

    monkeypatch.setattr(round, "accept", credulous)


def sequences_that_leave_their_rows(monkeypatch):
    """A sequence moves into a free slot and leaves its cache behind."""
    monkeypatch.setattr(TargetCache, "move", lambda self, source, goal: None)


PLANTS = (lazy_compaction, one_length_for_all, everything_accepted)


@pytest.mark.parametrize(
    "plant, shapes", [*itertools.product(PLANTS, POLICIES), (sequences_that_leave_their_rows, "exact")]
)
def test_this_file_notices(plant, shapes, monkeypatch):
    target, lengths = tiny_target("llama"), (20, 1, 5, 9)

    class Hidden(ScriptedDraft):
        """The right token is the second child: accepted nodes do not lie where they belong."""

        def logits(self, hidden):
            logits = super().logits(hidden)
            first = (logits.argmax(-1, keepdim=True) + 1) % VOCAB
            return logits.scatter(-1, first, 11.0)

    drafter = Hidden(target, *(script("llama", length, 30) for length in lengths), wrong=5)
    stop = plain("llama", 1, 30)[1]  # the shortest prompt, which lies first, ends early
    options = {"shapes": shapes, "max_new_tokens": 30, "eos_token_ids": (stop,)}
    expected = [one.token_ids for one in batch("llama", drafter, lengths, TreeShape(20, 3, 3), **options)]
    assert any(len(answer) < 30 for answer in expected)
    module._sessions.clear()
    plant(monkeypatch)
    found = batch("llama", drafter, lengths, TreeShape(20, 3, 3), **options)
    assert [one.token_ids for one in found] != expected


# -- which shapes ------------------------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_exact():
    assert not uses_fixed_shapes("auto", tiny_target("llama"), None)
    assert uses_fixed_shapes("fixed", tiny_target("llama"), None)
    assert not uses_fixed_shapes("fixed", tiny_target("llama"), None, trace=True), "traces are read on the host"


def test_what_cannot_be_fixed_is_said():
    target = tiny_target("llama")
    for options, reason in (({"pictures": True}, "pictures"), ({"adaptive": True}, "--adaptive decides every tree")):
        with pytest.raises(UserError, match=reason):
            uses_fixed_shapes("fixed", target, None, **options)
    with pytest.raises(UserError, match="the drafter reads"):
        uses_fixed_shapes("fixed", target, PromptLookup())
    hybrid = Target(tiny_model(next(iter(HYBRIDS))), tap_layers=(1, 2, 3), name="hybrid")
    with pytest.raises(UserError, match="hybrid: .*running state.*Use --shapes auto or exact"):
        uses_fixed_shapes("fixed", hybrid, None)


def test_bad_calls():
    with pytest.raises(UserError, match="no prompts"):
        next(stream(tiny_target("llama"), None, [], max_new_tokens=2))
    with pytest.raises(UserError, match="batch_size=0"):
        batch("llama", None, (5,), batch_size=0)
    assert batch("llama", None, ()) == []
    other = Target(tiny_model("llama"), tap_layers=(1, 3, 4), name="other")
    with pytest.raises(UserError, match=r"tap layers \[1, 3, 4\]"):
        batch("llama", tiny_draft(other), (5,))
