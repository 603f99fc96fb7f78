"""What capturing rounds into CUDA graphs needs, shown without a GPU.

Rounds never wait for the device, and recorded rounds give the same text when they are replayed.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from batching import GREEDY, NEW, PENALTY, RAGGED, answers, batch, opened, plain, script
from tiny import NAMES, ScriptedDraft, prompt, tiny_draft, tiny_model, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fledge.decoding import capture, costs, session
from fledge.decoding import generate as module
from fledge.decoding.capture import Captured, rehearse
from fledge.decoding.generate import generate, open_session
from fledge.decoding.masks import Masks
from fledge.decoding.records import Sampling
from fledge.decoding.requests import Request
from fledge.decoding.round import Round, Shapes
from fledge.decoding.session import Session
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target import native
from fledge.target.gpu_exact import Paths
from fledge.target.model import Target

pytestmark = pytest.mark.usefixtures("small_buckets")


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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_is_timed_can_be_captured(name, monkeypatch):
    """What is timed for a GPU is captured, so it never waits either (drafts: the round's own test)."""
    timed = []

    def checked(call, device):
        with no_waiting():
            call()
        timed.append(call)
        return capture.as_captured(call, device)

    monkeypatch.setattr(costs, "as_captured", checked)
    costs.verify_times(tiny_target(name), prompt(9), (1, 4, 8))
    assert len(timed) == 3
    with pytest.raises(AssertionError, match="the round"):
        costs.times_in_turns({1: lambda: torch.ones(2).nonzero()}, torch.device("cpu"))


def test_tokens_of_a_path_are_found_without_waiting():
    ancestors, lengths, levels = torch.ones(2, 3, 3).tril().bool(), torch.tensor([4, 9]), torch.arange(3)
    with no_waiting():
        Paths.of(lengths, levels.expand(2, -1), ancestors)


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
    assert shown.count("not captured (called a synchronizing CUDA operation at test_captured_rounds.py:") == 1


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
