"""The static engine emits what plain decoding of each prompt alone emits: batches, ragged lengths, buckets and all.

Buckets are 16 rows here, so that generations of some 30 rows pass through several.
"""

import functools
import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny import HYBRIDS, NAMES, VOCAB, ScriptedDraft, ScriptedRows, prompt, tiny_draft, tiny_model, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fledge.decoding import static_engine
from fledge.decoding.attention import NAME
from fledge.decoding.batches import choose_engine, generate_batch, stream
from fledge.decoding.captured import Captured, Stopwatch, rehearse
from fledge.decoding.generate import Generation, Sampling, TreeShape, generate_plain, generate_speculative
from fledge.decoding.masks import Masks
from fledge.decoding.static_cache import BatchCache
from fledge.decoding.static_engine import BatchGeneration, StaticEngine
from fledge.decoding.static_round import Round
from fledge.errors import UserError
from fledge.target.model import Target

GREEDY = Sampling()
NEW, TREE = 10, TreeShape()
RAGGED = (20, 1, 5)  # lengths of prompts
CASES = (  # head, tree, prompts
    ("random", TreeShape(60, 7, 10), RAGGED),
    ("zero", TreeShape(6, 4, 1), (5, 5)),
    ("adversarial", TreeShape(8, 0, 10), (1,)),
    ("every third token wrong", TreeShape(32, 4, 4), RAGGED),
    ("every third token wrong", TreeShape(60, 5, 10), (20,)),
    ("random", TreeShape(1, 5, 10), (5, 1)),
    (None, TreeShape(), RAGGED),
)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(static_engine, "BUCKET", 16)


@functools.cache
def plain(name: str, length: int, new: int = NEW) -> list[int]:
    """By the dynamic engine, alone."""
    return generate_plain(
        tiny_target(name), prompt(length), max_new_tokens=new, sampling=GREEDY, eos_token_ids=()
    ).token_ids  # fmt: skip


def script(name: str, length: int, wrong: int = 0, new: int = NEW) -> list[int]:
    """A prompt and its answer; every `wrong`-th token is not the answer's."""
    tokens = prompt(length) + plain(name, length, new)
    return [(token + (wrong > 0 and j % wrong == 0)) % VOCAB for j, token in enumerate(tokens)]


def head_of(kind: str | None, name: str, lengths: tuple[int, ...]):
    if kind == "every third token wrong":
        return ScriptedRows(tiny_target(name), [script(name, length, wrong=3) for length in lengths])
    return None if kind is None else tiny_draft(tiny_target(name), kind)


def static(name: str, head, lengths: tuple[int, ...], tree: TreeShape = TREE, **changes) -> list[Generation]:
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "eos_token_ids": (), "engine": "static", **changes}
    target = changes.pop("target", None) or tiny_target(name)
    options.pop("target", None)
    return generate_batch(target, head, [prompt(length) for length in lengths], tree=tree, **options)


@pytest.mark.parametrize("name", NAMES)
def test_static_is_plain(name):
    for kind, tree, lengths in CASES:
        found = static(name, head_of(kind, name, lengths), lengths, tree)
        for length, one in zip(lengths, found, strict=True):
            assert one.token_ids == plain(name, length), (kind, tree, lengths, length)
            check_books(one, tree if kind else None)


def check_books(one: Generation, tree: TreeShape | None) -> None:
    assert one.finish_reason == "length"
    assert one.drafted_depth == (tree.levels if tree else 0)
    if tree and tree.levels:
        assert len(one.token_ids) == 1 + sum(one.accepted) + one.num_forwards and one.num_forwards == len(one.accepted)
        assert all(0 <= kept <= tree.levels for kept in one.accepted)
    else:
        assert one.num_forwards == len(one.token_ids) - 1 and not any(one.accepted)
    assert list(one.phases_s) == ["prefill", "draft", "verify", "accept", "other"]
    assert one.decode_s == pytest.approx(sum(one.phases_s.values()) - one.ttft_s)


@pytest.mark.parametrize("wrong", [0, 2, 3, 5])
def test_rounds_accept_what_each_prompt_alone_would(wrong):
    """Per-row acceptance: every count is the dynamic engine's."""
    target, lengths, tree = tiny_target("llama"), (8, 3, 20, 8), TreeShape(20, 3, 4)
    scripts = [script("llama", length, wrong, 31) for length in lengths]
    found = static("llama", ScriptedRows(target, scripts), lengths, tree, max_new_tokens=31)
    for length, its_script, one in zip(lengths, scripts, found, strict=True):
        alone = generate_speculative(
            target, ScriptedDraft(target, its_script), prompt(length), tree=tree, max_new_tokens=31, sampling=GREEDY,
            eos_token_ids=(),
        )  # fmt: skip
        assert one.token_ids == alone.token_ids
        assert one.accepted[:-1] == alone.accepted[:-1]  # the dynamic engine's last tree is as deep as its room
    assert wrong or found[0].accepted == [4] * 6


@pytest.mark.parametrize("limit", range(1, 10))
def test_the_limit_cuts_mid_tree(limit):
    target, lengths = tiny_target("llama"), (8, 3)
    head = ScriptedRows(target, [script("llama", 8), script("llama", 3, wrong=2)])
    found = static("llama", head, lengths, TreeShape(60, 5, 10), max_new_tokens=limit)
    assert [one.token_ids for one in found] == [plain("llama", length)[:limit] for length in lengths]


@pytest.mark.parametrize("position", range(0, 8))
def test_sequences_end_at_their_own_stop_tokens(position):
    """The first ends in mid-tree, wherever that is; the others go on and are not disturbed."""
    target, lengths = tiny_target("llama"), (8, 3, 20)
    answers = [plain("llama", length, 30) for length in lengths]
    stop = answers[0][position]
    head = ScriptedRows(target, [script("llama", length, new=30) for length in lengths])
    for one_head in (head, None):
        found = static("llama", one_head, lengths, TreeShape(60, 5, 10), max_new_tokens=30, eos_token_ids=(stop, 999))
        for answer, one in zip(answers, found, strict=True):
            ends = answer.index(stop) + 1 if stop in answer else 30
            assert one.token_ids == answer[:ends]
            assert one.finish_reason == ("stop" if stop in answer else "length")


def test_positions_end_each_sequence_cleanly():
    """Nodes past the last position are computed and never emitted."""
    target = Target(tiny_model("qwen3", max_position_embeddings=24), tap_layers=(1, 2, 3), name="short")
    found = static("qwen3", tiny_draft(target), (20, 5), TreeShape(60, 7, 4), max_new_tokens=50, target=target)
    assert [len(one.token_ids) for one in found] == [4, 19]
    for length, one in zip((20, 5), found, strict=True):
        assert one.token_ids == generate_plain(
            target, prompt(length), max_new_tokens=50, sampling=GREEDY, eos_token_ids=()
        ).token_ids  # fmt: skip
    with pytest.raises(UserError, match="the prompt has 24 tokens"):
        static("qwen3", None, (24, 5), target=target)


def test_an_engine_serves_again():
    """Long, then short, then another batch: nothing of an earlier generation is left."""
    target = tiny_target("gemma3")
    head = tiny_draft(target)
    for lengths in ((20, 5), (1, 5), (5, 20), (20, 20, 1)):
        found = static("gemma3", head, lengths, TreeShape(12, 3, 3))
        assert [one.token_ids for one in found] == [plain("gemma3", length) for length in lengths]
    assert len(static_engine._engines[target]) <= static_engine.KEPT_ENGINES


def test_batches_are_cut_to_size():
    told: list[tuple[int, list[int]]] = []
    found = static("llama", None, RAGGED, batch_size=2, on_tokens=lambda row, new: told.append((row, new)))
    assert [one.token_ids for one in found] == [plain("llama", length) for length in RAGGED]
    for row, one in enumerate(found):
        assert list(itertools.chain(*(new for which, new in told if which == row))) == one.token_ids


def test_streams_rounds():
    target, lengths = tiny_target("llama"), (8, 3)
    head = ScriptedRows(target, [script("llama", 8), script("llama", 3, wrong=2)])
    options = dict(tree=TreeShape(20, 3, 4), max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=())
    rounds = list(stream(target, head, [prompt(length) for length in lengths], **options))
    assert [len(new) for new in rounds[0]] == [1, 1]
    assert [len(new) for new in rounds[1]] == [5, 2] or len(rounds[1][0]) == 5
    assert rounds[-1][0] == [], "the first prompt ends earlier"
    for row, length in enumerate(lengths):
        assert list(itertools.chain(*(new[row] for new in rounds))) == plain("llama", length)
    assert target.text_config._attn_implementation != NAME


def test_a_second_generation_ends_the_first():
    target = tiny_target("llama")
    options = dict(tree=TreeShape(), max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=())
    first, second = (stream(target, None, [prompt(5)], **options) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(UserError, match="another generation began"):
        next(first)
    assert len(list(second)) == NEW - 1


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


def begun(name: str, head, sampling: Sampling = GREEDY) -> StaticEngine:
    """An engine after the prefill of a ragged batch."""
    target = tiny_target(name)
    engine = StaticEngine(target, head, TreeShape(20, 3, 4), 3, 64, sampling)
    engine.seed(0)
    engine.begin([prompt(length) for length in RAGGED], [NEW] * 3, frozenset({3}))
    return engine


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 20)])
def test_a_round_never_waits_for_the_device(name, sampling):
    for head in (tiny_draft(tiny_target(name)), None):
        engine = begun(name, head, sampling)
        with no_waiting():
            engine.launch(20, Stopwatch(torch.device("cpu")))
            engine.launch(25, Stopwatch(torch.device("cpu")))


@pytest.mark.parametrize(
    "planted", [lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: bool(x.any()), lambda x: x[x > 0]]
)
def test_a_planted_wait_is_found(planted, monkeypatch):
    engine = begun("llama", None)
    real = Round.accept

    def accept(self):
        planted(self.state.lengths)
        real(self)

    monkeypatch.setattr(Round, "accept", accept)
    with pytest.raises(AssertionError, match="the round|as index"), no_waiting():
        engine.launch(20, Stopwatch(torch.device("cpu")))


def test_shapes_do_not_depend_on_what_was_accepted():
    target = tiny_target("llama")
    shapes = []
    for wrong in (0, 2):
        head = ScriptedRows(target, [script("llama", length, wrong) for length in RAGGED])
        engine = begun("llama", head)
        engine.launch(20, Stopwatch(torch.device("cpu")))
        round_ = engine.round
        shapes.append([t.shape for t in (*vars(round_.state).values(), round_._logits, round_._trees.ancestors)])
        accepted = round_.state.news[:, 0].tolist()
        assert accepted == [5, 5, 5] if wrong == 0 else max(accepted) < 5
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=4)])
def test_a_rehearsal_leaves_no_trace(sampling, monkeypatch):
    """Graphs are captured in mid-generation: what runs before a capture must not move it."""
    head = tiny_draft(tiny_target("gemma3"))
    expected = static("gemma3", head, RAGGED, sampling=sampling)
    real = StaticEngine.launch

    def rehearsed(self, longest, watch):
        with self.round.running():
            rehearse(self.round, self.round.capacity)
        real(self, longest, watch)

    monkeypatch.setattr(StaticEngine, "launch", rehearsed)
    again = static("gemma3", head, RAGGED, sampling=sampling)
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]


def test_news_may_be_read_a_round_late(monkeypatch):
    """As on a GPU: the next round is launched before the last one's tokens are known."""
    target, lengths = tiny_target("llama"), (8, 3, 20)
    head = ScriptedRows(target, [script("llama", 8), script("llama", 3, 2), script("llama", 20, 3)])
    launched = []
    real = StaticEngine.launch
    monkeypatch.setattr(
        StaticEngine, "launch", lambda self, *args: (launched.append(self.in_flight), real(self, *args))
    )
    batch = BatchGeneration(
        target, head, [prompt(length) for length in lengths], tree=TreeShape(20, 3, 4), max_new_tokens=NEW,
        sampling=GREEDY, eos_token_ids=(),
    )  # fmt: skip
    batch._engine.in_flight = 1
    rounds = list(batch.rounds())
    assert [one.token_ids for one in batch.generations()] == [plain("llama", length) for length in lengths]
    assert len(launched) == len(rounds), "one round more than the prefill's tokens and the rounds that were read"


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
        state, generator = self._round.state.copy(), self._round.generator
        draws = generator.get_state() if generator is not None else None
        self._graphs[bucket] = {}
        for name, part in self._round.parts(bucket).items():
            with Recorded() as recorded:
                part()
            self._graphs[bucket][name] = recorded
        self._round.state.set(**state)  # a capture runs nothing
        if generator is not None:
            generator.set_state(draws)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_rounds_are_the_real_ones(name):
    """Rounds recorded once per bucket and replayed for the rest of it, and for the next prompts, decode the same."""
    target = tiny_target(name)
    cases = [(tiny_draft(target), GREEDY)]
    if name == "gemma3":
        cases += [(None, GREEDY), (tiny_draft(target), Sampling(1.0, seed=1))]
    for head, sampling in cases:
        options = dict(tree=TreeShape(20, 3, 4), max_new_tokens=NEW, sampling=sampling, eos_token_ids=())
        batches = [[prompt(length) for length in lengths] for lengths in (RAGGED, (5, 8, 9))]
        expected = [generate_batch(target, head, prompts, engine="static", **options) for prompts in batches]
        recorded = None
        for prompts, answers in zip(batches, expected, strict=True):
            batch = BatchGeneration(target, head, prompts, **options)
            recorded = recorded or RecordedRounds(batch._engine.round)
            assert recorded._round is batch._engine.round
            batch._engine.captured, batch._engine.in_flight = recorded, 1
            list(batch.rounds())
            assert [one.token_ids for one in batch.generations()] == [one.token_ids for one in answers]
        assert len(recorded._graphs) > 1
        static_engine._engines[target].clear()


def test_buckets_are_captured_before_the_clock_runs():
    """An engine that has served, then is prepared for longer prompts: its rounds are ready, and nothing has moved."""
    target, lengths = tiny_target("llama"), (20, 5)
    head, options = tiny_draft(target), dict(tree=TREE, max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=())
    first = BatchGeneration(target, head, [prompt(1), prompt(1)], **{**options, "max_new_tokens": 30})
    engine = first._engine
    engine.captured = recorded = RecordedRounds(engine.round)
    list(first.rounds())
    batch = BatchGeneration(target, head, [prompt(length) for length in lengths], **options)
    assert batch._engine is engine
    ready = set(recorded._graphs)
    list(batch.rounds())
    static_engine._engines[target].clear()
    assert set(recorded._graphs) == ready
    assert [one.token_ids for one in batch.generations()] == [plain("llama", length) for length in lengths]


def test_a_round_the_host_takes_part_in_cannot_be_recorded(monkeypatch):
    """The negative control: lengths that pass through the host stay what they were when the round was recorded."""
    real = Masks.trees
    monkeypatch.setattr(
        Masks, "trees", lambda self, lengths, *more: real(self, torch.tensor(lengths.tolist()), *more)
    )  # fmt: skip
    target, ids = tiny_target("llama"), [prompt(5)]
    options = dict(tree=TREE, max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=())
    assert generate_batch(target, None, ids, engine="static", **options)[0].token_ids == plain("llama", 5)
    batch = BatchGeneration(target, None, ids, **options)
    batch._engine.captured = RecordedRounds(batch._engine.round)
    list(batch.rounds())
    static_engine._engines[target].clear()
    assert batch.generations()[0].token_ids != plain("llama", 5)


def test_what_the_device_will_not_capture_runs_launch_by_launch(monkeypatch, capsys):
    """A model that waits for the device in its forward makes the capture fail; the answer is the same."""

    class Stream:
        def wait_stream(self, other):
            pass

    def refuse(graph, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: nullcontext(), "graph": refuse,
             "synchronize": lambda: None, "CUDAGraph": lambda: None}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    target, ids = tiny_target("llama"), [prompt(5)]
    batch = BatchGeneration(
        target, tiny_draft(target), ids, tree=TREE, max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=()
    )  # fmt: skip
    batch._engine.captured = Captured(batch._engine.round)
    list(batch.rounds())
    static_engine._engines[target].clear()
    assert batch.generations()[0].token_ids == plain("llama", 5)
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("not captured (operation not permitted when stream is capturing)") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: what is captured runs only there")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt_oss", "hunyuan_v1_dense"])
def test_captured_rounds_are_the_uncaptured_ones(name):
    target = Target(tiny_model(name).cuda(), tap_layers=(1, 2, 3), name=name)
    head = tiny_draft(target).cuda()
    outputs = []
    for captured in (True, False):
        for one_head in (head, None):
            batch = BatchGeneration(
                target, one_head, [prompt(length) for length in RAGGED], tree=TreeShape(20, 3, 4), max_new_tokens=30,
                sampling=GREEDY, eos_token_ids=(),
            )  # fmt: skip
            if not captured:
                batch._engine.captured.refused = "asked for"
            list(batch.rounds())
            if captured:
                assert not batch._engine.captured.refused and len(batch._engine.captured._graphs) > 1
            outputs.append([one.token_ids for one in batch.generations()])
            static_engine._engines[target].clear()
    assert all(output == outputs[0] for output in outputs)
    dynamic = [generate_plain(target, prompt(length), max_new_tokens=30, sampling=GREEDY, eos_token_ids=()).token_ids
               for length in RAGGED]  # fmt: skip
    assert outputs[0] == dynamic


# -- negative controls -------------------------------------------------------------------------------------------------


def lazy_compaction(monkeypatch):
    monkeypatch.setattr(BatchCache, "compact", lambda self, lengths, path: None)


def one_length_for_all(monkeypatch):
    """What a batch without lengths of its own would see."""
    real = Masks.trees
    monkeypatch.setattr(
        Masks, "trees",
        lambda self, lengths, levels, ancestors, bucket: real(
            self, lengths.max().expand_as(lengths), levels, ancestors, bucket
        ),
    )  # fmt: skip


def everything_accepted(monkeypatch):
    from fledge.decoding import static_round

    def credulous(trees, chosen, num_slots):
        path = torch.zeros(len(chosen), num_slots, dtype=torch.int64)
        path[:, 1] = 1
        return path, torch.full((len(chosen),), 2)

    monkeypatch.setattr(static_round, "accepted_paths", credulous)


@pytest.mark.parametrize("plant", [lazy_compaction, one_length_for_all, everything_accepted])
def test_this_file_notices(plant, monkeypatch):
    plant(monkeypatch)
    target = tiny_target("llama")

    class Hidden(ScriptedRows):
        """The right token is the second child: accepted nodes do not lie where they belong."""

        def logits(self, hidden):
            logits = super().logits(hidden)
            first = (logits.argmax(-1, keepdim=True) + 1) % VOCAB
            return logits.scatter(-1, first, 11.0)

    head = Hidden(target, [script("llama", length) for length in RAGGED])
    found = static("llama", head, RAGGED, TreeShape(20, 3, 3))
    assert [one.token_ids for one in found] != [plain("llama", length) for length in RAGGED]


# -- which engine ------------------------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_the_dynamic_engine(monkeypatch):
    target = tiny_target("llama")
    assert choose_engine("auto", target, None) == "dynamic"
    monkeypatch.setattr(static_engine, "StaticEngine", None)  # would fail if it were used
    told: list[int] = []
    found = static("llama", tiny_draft(target), RAGGED, engine="auto", on_tokens=lambda row, new: told.append(row))
    assert [one.token_ids for one in found] == [plain("llama", length) for length in RAGGED]
    assert sorted(set(told)) == [0, 1, 2]


def hybrid() -> Target:
    return Target(tiny_model(next(iter(HYBRIDS))), tap_layers=(1, 2, 3), name="hybrid")


def test_what_it_cannot_do_is_said():
    target = tiny_target("llama")
    for options, reason in (({"pictures": True}, "pictures"), ({"adaptive": True}, "--adaptive decides every tree")):
        with pytest.raises(UserError, match=reason):
            choose_engine("static", target, None, **options)
    with pytest.raises(UserError, match="hybrid: .*running state.*Use --engine auto or dynamic"):
        choose_engine("static", hybrid(), None)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    long = Target(tiny_model("phi3", rope_parameters=rope), tap_layers=(1, 2, 3), name="long")
    with pytest.raises(UserError, match="longrope"):
        next(stream(long, None, [[5]], tree=TreeShape(), max_new_tokens=2, sampling=GREEDY))
    with pytest.raises(UserError, match="no prompts"):
        next(stream(target, None, [], tree=TREE, max_new_tokens=2, sampling=GREEDY))
    with pytest.raises(UserError, match="batch_size=0"):
        static("llama", None, (5,), batch_size=0)
    assert static("llama", None, ()) == []


def test_a_head_with_other_taps_is_refused():
    other = Target(tiny_model("llama"), tap_layers=(1, 3, 4), name="other")
    with pytest.raises(UserError, match=r"tap layers \[1, 3, 4\]"):
        static("llama", tiny_draft(other), (5,))
