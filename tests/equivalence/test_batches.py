"""Batches emit what plain decoding of each prompt alone emits: ragged lengths, both shape policies, buckets and all.

Buckets are 16 rows here, so that generations of some 30 rows pass through several.
"""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import HYBRIDS, NAMES, VOCAB, ScriptedDraft, prompt, tiny_draft, tiny_model, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fledge.decoding import capture, round, session
from fledge.decoding import generate as module
from fledge.decoding.accept import accept
from fledge.decoding.attention import NAME
from fledge.decoding.cache import TargetCache
from fledge.decoding.capture import Captured, rehearse
from fledge.decoding.generate import generate, generate_batch, open_session, stream, uses_fixed_shapes
from fledge.decoding.masks import Masks
from fledge.decoding.records import Generation, Sampling
from fledge.decoding.requests import Request
from fledge.decoding.round import Round, Shapes
from fledge.decoding.session import Session
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target import native
from fledge.target.model import Target

GREEDY = Sampling()
NEW, TREE = 10, TreeShape()
RAGGED = (20, 1, 5)  # lengths of prompts
CASES = (  # drafter, tree, prompts
    ("random", TreeShape(60, 7, 10), RAGGED),
    ("zero", TreeShape(6, 4, 1), (5, 5)),
    ("adversarial", TreeShape(8, 0, 10), (1,)),
    ("every third token wrong", TreeShape(32, 4, 4), RAGGED),
    ("every third token wrong", TreeShape(60, 5, 10), (20,)),
    ("random", TreeShape(1, 5, 10), (5, 1)),
    (None, TreeShape(), RAGGED),
)
POLICIES = ("exact", "fixed")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(session, "BUCKET", 16)
    yield
    module._sessions.clear()  # sessions of small buckets, some of them with planted faults


@functools.cache
def plain(name: str, length: int, new: int = NEW) -> list[int]:
    return generate(
        tiny_target(name), None, prompt(length), max_new_tokens=new, eos_token_ids=(), shapes="exact"
    ).token_ids  # fmt: skip


def script(name: str, length: int, new: int = NEW) -> list[int]:
    return prompt(length) + plain(name, length, new)


def drafter_of(kind: str | None, name: str, lengths: tuple[int, ...]):
    if kind == "every third token wrong":
        return ScriptedDraft(tiny_target(name), *(script(name, length) for length in lengths), wrong=3)
    return None if kind is None else tiny_draft(tiny_target(name), kind)


def batch(name: str, drafter, lengths: tuple[int, ...], tree: TreeShape = TREE, **changes) -> list[Generation]:
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "eos_token_ids": (), "shapes": "fixed", **changes}
    target = options.pop("target", None) or tiny_target(name)
    return generate_batch(target, drafter, [prompt(length) for length in lengths], tree=tree, **options)


def opened(name: str, drafter, lengths: tuple[int, ...], **changes) -> Session:
    """A session of fixed shapes with these prompts waiting."""
    options = {"tree": TreeShape(20, 3, 4), "shapes": "fixed", "eos_token_ids": (3,), **changes}
    sampling = options.pop("sampling", GREEDY)
    requests = [Request(prompt(length), NEW, sampling) for length in lengths]
    found = open_session(tiny_target(name), drafter, requests, **options)
    for request in requests:
        found.add(request)
    return found


def answers(found: Session) -> list[list[int]]:
    states = list(found.waiting)
    found.run()
    return [state.token_ids for state in states]


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


PENALTY = Sampling(repetition_penalty=1.6)


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


# -- what capturing needs ----------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what needs a value, or a number of values, on the host."""

    refused = (
        "_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave.Tensor", "equal",
        "is_nonzero", "lift_fresh",  # the last: a number of the host as a tensor, which a capture cannot copy
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        assert not name.startswith(self.refused), f"the round asks the device: {func}"
        if name.startswith("index.") or name.startswith("index_put"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), "a boolean mask as index"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    """Reading a tensor's values raises; methods that may never reach the dispatcher are patched."""

    def refuse(*args, **kwargs):
        raise AssertionError("the round reads a tensor on the host")

    with pytest.MonkeyPatch.context() as patch:
        for method in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, method, refuse)
        with NoWaiting():
            yield


def begun(name: str, drafter, sampling: Sampling = GREEDY) -> Session:
    """A session after the prefill of a ragged batch."""
    found = opened(name, drafter, RAGGED, sampling=sampling)
    while found.waiting:
        found.step()
    return found


def run_once(found: Session, num_keys: int = 64) -> None:
    for part in found.round.parts(Shapes(num_keys)).values():
        part()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 20, min_p=0.02, repetition_penalty=1.1)])
def test_a_round_never_waits_for_the_device(name, sampling):
    for drafter in (tiny_draft(tiny_target(name)), None):
        found = begun(name, drafter, sampling)
        with found.round.verifier.running(), no_waiting():
            run_once(found)
            run_once(found)


@pytest.mark.parametrize(
    "planted", [lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: bool(x.any()), lambda x: x[x > 0]]
)
def test_a_planted_wait_is_found(planted, monkeypatch):
    found = begun("llama", None)
    real = Round.accept

    def waiting(self, shapes):
        planted(self.state.lengths)
        real(self, shapes)

    monkeypatch.setattr(Round, "accept", waiting)
    with pytest.raises(AssertionError, match="the round|as index"), found.round.verifier.running(), no_waiting():
        run_once(found)


def test_shapes_do_not_depend_on_what_was_accepted():
    target = tiny_target("llama")
    shapes = []
    for wrong in (0, 2):
        found = begun("llama", ScriptedDraft(target, *(script("llama", n) for n in RAGGED), wrong=wrong))
        with found.round.verifier.running():
            run_once(found)
        state, trees = found.round.state, found.round.trees
        shapes.append([t.shape for t in (*vars(state).values(), found.round._logits, trees.ancestors)])
        accepted = state.news[:, 0].tolist()
        assert accepted == [5, 5, 5] if wrong == 0 else min(accepted) < 5
        module._sessions.clear()
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=4), PENALTY])
def test_a_rehearsal_leaves_no_trace(sampling, monkeypatch):
    """Graphs are captured in mid-generation: what runs before a capture must not move it."""
    drafter = tiny_draft(tiny_target("gemma3"))
    expected = batch("gemma3", drafter, RAGGED, sampling=sampling)
    real = session.run_parts

    def rehearsed(round_, shapes, lap):
        rehearse(round_, shapes.num_keys)
        real(round_, shapes, lap)

    monkeypatch.setattr(session, "run_parts", rehearsed)
    again = batch("gemma3", drafter, RAGGED, sampling=sampling)
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]


def test_rounds_may_be_read_late():
    """As on a GPU: the next round is launched before the last one's tokens are known; prompts still join."""
    target, lengths = tiny_target("llama"), (8, 3, 20, 5)
    drafter = ScriptedDraft(target, *(script("llama", length) for length in lengths), wrong=3)
    found = opened("llama", drafter, lengths, batch_size=2, eos_token_ids=())
    found._behind = 1
    assert answers(found) == [plain("llama", length) for length in lengths]


@pytest.fixture
def seen_operations(monkeypatch):
    """Operations of `native.c` are calls that a recording does not see, and that no GPU makes: PyTorch does them."""
    monkeypatch.setattr(native, "_suits", lambda states: False)


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of a part with the tensors they read and wrote. `replay` runs
    them again on the same memory, so that what the host decided while recording stays decided."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, made))
        return made

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, made in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither view nor in place
                        old.copy_(new)


class RecordedRounds(Captured):
    """`Captured` with recordings for graphs."""

    def _capture(self, bucket: int) -> None:
        rehearse(self._round, bucket)
        state = self._round.state.copy()
        self._graphs[bucket] = {}
        for name, part in self._round.parts(Shapes(bucket)).items():
            with Recorded() as recorded:
                part()
            self._graphs[bucket][name] = recorded
        self._round.state.set(**state)  # a capture runs nothing


def recorded_session(name: str, drafter, lengths: tuple[int, ...], **changes) -> Session:
    found = opened(name, drafter, lengths, **changes)
    if found._captured is None:
        found._captured, found._behind = RecordedRounds(found.round, name), 1
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("seen_operations")
def test_recorded_rounds_are_the_real_ones(name):
    """Rounds recorded once per bucket and replayed for the rest of it, and for the next prompts, decode the same."""
    target = tiny_target(name)
    cases = [(tiny_draft(target), GREEDY)]
    if name == "gemma3":
        cases += [(None, GREEDY), (tiny_draft(target), Sampling(1.0, seed=1)), (tiny_draft(target), PENALTY)]
    for drafter, sampling in cases:
        lengths = (RAGGED, (5, 8, 9))
        options = {"sampling": sampling, "eos_token_ids": ()}
        expected = [answers(opened(name, drafter, some, **options)) for some in lengths]
        module._sessions.clear()
        rounds = []
        for some, wanted in zip(lengths, expected, strict=True):
            found = recorded_session(name, drafter, some, **options)
            rounds.append(found.round)
            assert answers(found) == wanted
        assert rounds[0] is rounds[1] and len(found._captured._graphs) > 1
        module._sessions.clear()


@pytest.mark.usefixtures("seen_operations")
def test_buckets_are_captured_before_the_clock_runs():
    """A session that has served, then is prepared for longer prompts: its rounds are ready, and nothing has moved."""
    drafter, options = tiny_draft(tiny_target("llama")), {"eos_token_ids": ()}
    first = recorded_session("llama", drafter, (20, 1), **options)
    answers(first)
    again = opened("llama", drafter, (20, 5), **options)
    ready = set(again._captured._graphs)
    assert again is first and answers(again) == [plain("llama", length) for length in (20, 5)]
    assert set(again._captured._graphs) == ready


@pytest.mark.usefixtures("seen_operations")
def test_what_is_captured_before_the_first_request_draws(monkeypatch):
    """Rounds were captured while a new session's slots still said greedy, so on a GPU its first buckets ignored the
    temperature."""
    real = Session.__post_init__

    def recording(self):
        real(self)
        self._captured, self._behind = RecordedRounds(self.round, "llama"), 1

    options = dict(sampling=Sampling(1.0, seed=1), eos_token_ids=())
    greedy, expected = [plain("llama", n) for n in RAGGED], answers(opened("llama", None, RAGGED, **options))
    module._sessions.clear()
    monkeypatch.setattr(Session, "__post_init__", recording)
    assert answers(opened("llama", None, RAGGED, **options)) == expected != greedy


def test_a_session_of_fixed_shapes_has_one_law():
    found = opened("llama", None, (5,), sampling=Sampling(1.0, seed=1))
    found.add(Request(prompt(3), NEW, Sampling(1.0, seed=2)))
    with pytest.raises(UserError, match="share one sampling"):
        found.add(Request(prompt(3), NEW, Sampling(0.9, seed=2)))


def test_a_round_the_host_takes_part_in_cannot_be_recorded(monkeypatch):
    """The negative control: lengths that pass through the host stay what they were when the round was recorded."""
    real = Masks.trees
    monkeypatch.setattr(
        Masks, "trees", lambda self, lengths, *args, **more: real(self, torch.tensor(lengths.tolist()), *args, **more)
    )  # fmt: skip
    assert answers(opened("llama", None, (5,), eos_token_ids=())) == [plain("llama", 5)]
    module._sessions.clear()
    assert answers(recorded_session("llama", None, (5,), eos_token_ids=())) != [plain("llama", 5)]


class FakeGenerator:
    """A device's generator: a state that it may share with a capture, or get a new one of."""

    device = "cpu"

    def __init__(self) -> None:
        self.holds = torch.Generator()

    def get_state(self) -> torch.Tensor:
        return self.holds.get_state()

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        self.holds = state


class FakeCuda:
    """What a capture asks of torch.cuda: streams that are current, the way waiting is treated, graphs."""

    def __init__(self) -> None:
        self.modes, self.current = ["default"], ["main"]
        self.default_generators = [FakeGenerator()]

    def names(self) -> dict:
        return {
            "Stream": lambda device: self, "current_stream": lambda: self, "stream": self.stream, "graph": self.graph,
            "CUDAGraph": lambda: None, "get_sync_debug_mode": lambda: self.modes[-1], "current_device": lambda: 0,
            "set_sync_debug_mode": self.modes.append, "default_generators": self.default_generators,
        }  # fmt: skip

    def wait_stream(self, other: object) -> None:
        """Streams of one thread."""

    @contextmanager
    def stream(self, one):
        depth = len(self.current)
        self.current.append("side")
        try:
            yield
        finally:
            del self.current[depth:]

    @contextmanager
    def graph(self, graph, pool, stream):
        self.current.append("capturing")
        self.default_generators[0].holds.manual_seed(99)  # stands for the capture's hold on it
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # its stream stays current


@pytest.fixture
def fake_cuda(monkeypatch):
    made = FakeCuda()
    for name, fake in made.names().items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture.capture_stream.cache_clear()
    yield made
    capture.capture_stream.cache_clear()


def refused_session() -> Session:
    found = opened("llama", tiny_draft(tiny_target("llama")), (5,), eos_token_ids=())
    found._captured = Captured(found.round, "llama")
    assert answers(found) == [plain("llama", 5)]
    return found


def test_what_the_device_will_not_capture_runs_launch_by_launch(fake_cuda, monkeypatch, capsys):
    """A model that waits for the device is found in a rehearsal, before a capture begins: the answer is the same, and
    neither the stream nor the way torch treats waiting stays changed."""

    def planted():
        if fake_cuda.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore lines")

    real = Round.verify
    monkeypatch.setattr(Round, "verify", lambda self, shapes: (planted(), real(self, shapes))[1])
    refused_session()
    assert fake_cuda.modes[-1] == "default" and fake_cuda.current == ["main"]
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("not captured (called a synchronizing CUDA operation)") == 1


def test_a_capture_that_fails_half_way_leaves_stream_and_generator(fake_cuda, capsys):
    """`torch.cuda.graph` raises before it leaves its stream, and its hold on the generator stays: every later draw on
    the device was refused."""
    before = fake_cuda.default_generators[0].get_state()
    refused_session()
    assert fake_cuda.current == ["main"]
    assert torch.equal(fake_cuda.default_generators[0].get_state(), before)
    assert "due to a previous error during capture" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: what is captured runs only there")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt_oss", "hunyuan_v1_dense"])
def test_captured_rounds_are_the_uncaptured_ones(name):
    dtype = torch.bfloat16 if name == "gpt_oss" else torch.float32  # its fp32 experts read offsets on the host
    target = Target(tiny_model(name).to("cuda", dtype), tap_layers=(1, 2, 3), name=name)
    drafter = tiny_draft(target).to("cuda", dtype)
    outputs = []
    for captured, one_drafter in itertools.product((True, False), (drafter, None)):
        requests = [Request(prompt(length), 30) for length in RAGGED]
        found = open_session(target, one_drafter, requests, tree=TreeShape(20, 3, 4), eos_token_ids=())
        if not captured:
            found._captured.refused = "asked for"
        states = [found.add(request) for request in requests]
        found.run()
        assert not captured or (not found._captured.refused and len(found._captured._graphs) > 1)
        outputs.append([state.token_ids for state in states])
        module._sessions.clear()
    assert all(output == outputs[0] for output in outputs)
    alone = [generate(target, None, prompt(n), max_new_tokens=30, eos_token_ids=(), shapes="exact") for n in RAGGED]
    assert outputs[0] == [one.token_ids for one in alone]


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
