"""The sections of on_gpu.py: what each measures, and what its figures are compared with.

A figure is a value with the ceiling that the card's memory or matrix units set (measured here, not taken from a data
sheet), the share of it that is reached, the goal, and the best published peer where there is one. Goals and peers are
for one H100 and Qwen3-8B shapes; a rehearsal prints them all the same.
"""

import argparse
import copy
import functools
import itertools
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import decode_shapes
import torch
import torch.nn.functional as F
import train_step_worker

from fledge.decoding.capture import Timer
from fledge.decoding.generate import Sampling, TreeShape, drop_sessions, generate_batch
from fledge.drafters.eagle3.model import DraftModel
from fledge.target.model import Target

TESTS = Path(__file__).resolve().parents[1] / "tests"
NAMES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "hunyuan_v1_dense")
TREES = {"60/5/10": TreeShape(60, 5, 10), "16/3/4": TreeShape(16, 3, 4), "6/4/1": TreeShape(6, 4, 1)}
KERNELS = 40  # shown of a profile
TAU = 3.5  # of a trained head, for tokens per second from the time of a round


class LeftOut(Exception):
    """Why a section does not apply here."""


@dataclass
class Bench:
    """The device, and what several sections share."""

    device: torch.device
    small: bool
    target: Path | None = None
    draft: Path | None = None
    _pair: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        return cls(torch.device(args.device), args.small, args.target, args.draft)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any], repeats: int = 20) -> float:
        """Milliseconds of a call among calls in a row, by the device's own clock."""
        repeats = 2 if self.small else repeats
        for _ in range(1 if self.small else 3):
            call()
        self.wait()
        timer = Timer(self.device)
        timer.lap("begin")
        for _ in range(repeats):
            call()
        timer.lap("calls")
        self.wait()
        return timer.seconds()["calls"] / repeats * 1e3

    @cached_property
    def bytes_per_s(self) -> float:
        """Of a copy, read and written."""
        size = 1 << (20 if self.small else 30)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        goal = torch.empty_like(source)
        return 2 * size / self.ms(lambda: goal.copy_(source), 10) * 1e3

    @cached_property
    def flops(self) -> float:
        """Of a product of large bf16 matrices."""
        size = 128 if self.small else 8192
        matrix = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.ms(lambda: matrix @ matrix, 5) * 1e3

    def pair(self) -> tuple[Target, DraftModel]:
        """A target and a head with random weights."""
        if not self._pair:
            if self.small:
                tiny = tiny_module()
                self._pair = [tiny.tiny_target("qwen3"), tiny.tiny_draft(tiny.tiny_target("qwen3"))]
            else:
                options = argparse.Namespace(shape="qwen3-8b", device=str(self.device), dtype="bfloat16", layers=None)
                self._pair = list(decode_shapes.random_pair(options))
        return self._pair[0], self._pair[1]

    def drop_pair(self) -> None:
        """Make room."""
        if self._pair:
            drop_sessions(self._pair[0])
            self._pair.clear()


@dataclass(frozen=True)
class Section:
    """A part that can be asked for by name."""

    budget_s: int
    what: str
    run: Callable[[Bench], dict[str, Any]]


SECTIONS: dict[str, Section] = {}
Function = Callable[[Bench], dict[str, Any]]


def section(budget_s: int) -> Callable[[Function], Function]:
    """Put a function into the table, in the order of the file."""

    def put(function: Function) -> Function:
        SECTIONS[function.__name__] = Section(budget_s, (function.__doc__ or "").splitlines()[0], function)
        return function

    return put


def figure(value: float, ceiling: float, unit: str, *, goal: float | None = None, peer: str | None = None) -> dict:
    """A value and what it is compared with. A ceiling of time is below the value, one of speed above it."""
    share = ceiling / value if unit in ("ms", "s") else value / ceiling
    rounded = {"value": round(value, 3), "unit": unit, "ceiling": round(ceiling, 3), "share": round(share, 3)}
    return rounded | {key: one for key, one in (("goal", goal), ("peer", peer)) if one is not None}


def tiny_module() -> Any:
    """The tests' table of tiny targets."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import tiny

    return tiny


# -- what comes first: the ceilings, and whether the answers are right -------------------------------------------------


@section(15)
def device(bench: Bench) -> dict[str, Any]:
    """The card's memory and matrix units: the ceilings of everything below."""
    found: dict[str, Any] = {"copy_tb_per_s": bench.bytes_per_s / 1e12, "bf16_tflops": bench.flops / 1e12}
    if bench.on_gpu:
        found |= {"cudnn": torch.backends.cudnn.version(), "memory_gib": torch.cuda.mem_get_info()[1] / 2**30}
    return found


@section(90)
def commands(bench: Bench) -> dict[str, Any]:
    """A user's commands on the device, with a tiny target: extract, train, bench, regenerate, decode."""
    tiny_module()
    from saved_target import save_target, write_conversations

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        target, data = save_target(work / "target", "qwen3"), write_conversations(work / "data.jsonl", 40)
        both = ["--target", target, "--num-gpus-total", "1"] if bench.on_gpu else ["--target", target]
        train = ["train", "--target", target, "--max-steps", "3"]
        bench_ = ["bench", *both, "--bench-name", "quick", "--question-end", "2", "--max-new-tokens", "24"]
        online = {kind: [*train, "--data", data, "--draft-type", kind, "--output-dir", work / kind]
                  for kind in ("eagle3.1", "dflash", "dspark")}  # fmt: skip
        words: dict[str, list[Any]] = {
            "extract": ["extract", "--target", target, "--data", data, "--output-dir", work / "states"],
            "train --states": [*train, "--states", work / "states", "--output-dir", work / "eagle3"],
            **{f"train {kind}": given for kind, given in online.items()},
            "bench": [*bench_, "--draft", work / "eagle3", "--output-dir", work / "b1"],
            "bench, T 1": [*bench_, "--draft", work / "eagle3.1", "--temperature", "1", "--output-dir", work / "b2"],
            "bench dflash": [*bench_, "--draft", work / "dflash", "--output-dir", work / "b3"],
            "bench dspark": [*bench_, "--draft", work / "dspark", "--output-dir", work / "b4"],
            "bench lookup": [*bench_, "--draft", "lookup", "--output-dir", work / "b5"],
            "regenerate": ["regenerate", "--engine", "transformers", "--target", target, "--data", data,
                           "--output-dir", work / "answers",
                           "--max-new-tokens", "16"],
            "decode": ["decode", "--target", target, "--draft", work / "eagle3", "--prompt", "the quick",
                       "--max-new-tokens", "16"],
        }  # fmt: skip
        found = {name: how_it_ended([str(word) for word in given]) for name, given in words.items()}
    failed = {name: end for name, end in found.items() if isinstance(end, str)}
    assert not failed, f"{failed}"
    return found


def how_it_ended(words: list[str]) -> float | str:
    """Seconds of a command, or what stopped it."""
    from fledge.cli import main as fledge

    begin = time.monotonic()
    try:
        fledge(words)
    except SystemExit as end:
        if end.code:
            return f"ended with {end.code}"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:200]
    return round(time.monotonic() - begin, 1)


@section(60)
def captured(bench: Bench) -> dict[str, Any]:
    """Captured rounds beside eager ones, token for token, for eight architectures; a seed repeats its text."""
    tiny, refused = tiny_module(), {}
    for name in NAMES[:2] if bench.small else NAMES:
        dtype = torch.bfloat16 if name in ("gpt_oss", "qwen3_moe") and bench.on_gpu else torch.float32
        target = Target(tiny.tiny_model(name).to(bench.device, dtype), tap_layers=(1, 2, 3), name=name)
        draft = tiny.tiny_draft(target).to(bench.device, dtype)
        prompts = [tiny.prompt(length) for length in (20, 1, 5)]
        for drafter, law in itertools.product((draft, None), (Sampling(), Sampling(0.8, 0.9, seed=5))):
            options: Any = {
                "tree": TreeShape(20, 3, 4), "max_new_tokens": 12 if bench.small else 30, "sampling": law,
                "eos_token_ids": (),
            }  # fmt: skip
            fixed, again, exact = (
                [one.token_ids for one in generate_batch(target, drafter, prompts, shapes=shapes, **options)]
                for shapes in ("fixed", "fixed", "exact")
            )
            assert fixed == again, f"{name}: the same seed gives another text"
            assert fixed == exact or dtype == torch.bfloat16, f"{name}: captured rounds give another text, {law}"
            refused[name] = refusal(target)
        drop_sessions(target)
    assert not any(refused.values()), f"not captured: {refused}"
    return {"architectures": list(refused)}


def refusal(target: Target) -> str:
    """Why the device would not capture this target's rounds."""
    from fledge.decoding.generate import _sessions

    kept = _sessions.get(target, {}).values()
    return next((one._captured.refused for one in kept if one._captured is not None and one._captured.refused), "")


@section(30)
def train_equal(bench: Bench) -> dict[str, Any]:
    """Attention beside its dense twin, and losses of a tiny training on the device beside the CPU's."""
    losses = {}
    for where in (torch.device("cpu"), bench.device):
        for trainer in ("fledge", "fledge-depths"):
            torch.manual_seed(0)
            args = train_args(trainer, "tiny", where)
            step = train_step_worker.fledge(args, documents([96, 160], 2, args))
            losses[str(where), trainer] = [float(step()) for _ in range(5)]
    worst = max(
        abs(a - b) / abs(b)
        for trainer in ("fledge", "fledge-depths")
        for a, b in zip(losses[str(bench.device), trainer], losses["cpu", trainer], strict=True)
    )
    assert worst < 0.02, f"losses differ by {worst:.1%}: {losses}"
    return {"largest_difference": worst}


@section(20)
def extract_equal(bench: Bench) -> dict[str, Any]:
    """A stored record is the live one, bit for bit."""
    from types import SimpleNamespace

    tiny = tiny_module()
    from tiny_trainer import samples

    from fledge.storage.states.plan import PlannedSample, PlannedShard
    from fledge.storage.states.shard import ShardBuffer
    from fledge.target.live import LiveSource

    target = Target(tiny.tiny_model("qwen3").to(bench.device, torch.bfloat16), tap_layers=(1, 2, 3), name="qwen3")
    data = samples(8)
    planned = tuple(PlannedSample(one.id, len(one.input_ids), int(one.loss_mask.sum()), 0) for one in data)
    facts: Any = SimpleNamespace(
        tap_layers=target.tap_layers, hidden_size=target.hidden_size, dtype="bfloat16", tap_storage="full",
        last_storage="all",
    )  # fmt: skip
    buffer, source = ShardBuffer(PlannedShard(0, planned), facts, pinned=bench.on_gpu), LiveSource(target)
    live = [source.record(sample) for sample in data]
    for record in live:
        buffer.put(record)
    bench.wait()
    for name in ("tap_hidden", "last_hidden"):
        assert torch.equal(buffer.tensors[name], torch.cat([getattr(one, name) for one in live]).cpu()), name
    return {"records": len(live)}


# -- decoding ----------------------------------------------------------------------------------------------------------


def streamed_bytes(target: Target) -> int:
    """Weights that a forward reads: the table of embeddings is looked up, not read, unless it is the head, too."""
    table = 0 if target.embedding_weight.data_ptr() == target.head_weight.data_ptr() else target.embedding_weight.nbytes
    return decode_shapes.size_of(target.model) - table


def rounds(
    bench: Bench, drafter: DraftModel | None, tree: TreeShape, batch: int = 1, *, few: bool = False, **more: Any
) -> dict[str, float]:
    """Milliseconds of a round by part, and tokens per second at one token a round."""
    target, _ = bench.pair()
    few = few or bench.small
    options = argparse.Namespace(new_tokens=16 if few else 64, repeats=1 if few else 3)
    length = more.pop("prompt", 20 if bench.small else 512)
    prompt = torch.randint(4, 100, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    made = decode_shapes.repeated(target, drafter, tree, prompt, "fixed", batch, options, **more)
    parts = {
        part: 1e3 * statistics.median(one.phases_s[part] / one.num_forwards for one in made)
        for part in ("draft", "verify", "accept", "other")
    }
    whole = 1e3 * statistics.median(one.decode_s / one.num_forwards for one in made)
    reason = refusal(target)
    return parts | {
        "round": whole, "forwards": sum(one.num_forwards for one in made) * (1 + 1 / len(made)),
        **({"not captured": reason} if reason else {}),
    }  # fmt: skip


@section(45)
def plain(bench: Bench) -> dict[str, Any]:
    """Plain decoding of one sequence, tokens per second."""
    target, _ = bench.pair()
    found = rounds(bench, None, TreeShape())
    speed = figure(
        1e3 / found["round"], bench.bytes_per_s / streamed_bytes(target), "tok/s", goal=170,
        peer="8B bf16 on an H100: 133 to 158",
    )  # fmt: skip
    return {"speed": speed, "ms": found}


@section(75)
def tree_rounds(bench: Bench) -> dict[str, Any]:
    """Rounds of three trees: draft, verify, accept; tokens per second at an acceptance length of 3.5."""
    target, draft = bench.pair()
    found: dict[str, Any] = {}
    for name, tree in TREES.items():
        parts = rounds(bench, draft, tree)
        verify = 1e3 * streamed_bytes(target) / bench.bytes_per_s
        drafting = 1e3 * tree.levels * decode_shapes.size_of(draft) / bench.bytes_per_s
        goals = {"draft": 1.8, "verify": 6.5, "round": 8.5} if name == "60/5/10" else {}
        ceilings = {"draft": drafting, "verify": verify, "round": drafting + verify}
        found[name] = {part: figure(parts[part], ceilings[part], "ms", goal=goals.get(part)) for part in ceilings}
        found[name]["accept_ms"] = parts["accept"]
        found[name]["at tau 3.5"] = figure(
            1e3 * TAU / parts["round"], 1e3 * TAU / (drafting + verify), "tok/s", goal=410 if goals else None,
            peer="SGLang, EAGLE-3 chain, MT-bench, 8B on an H100: 379",
        )  # fmt: skip
    return found


@section(40)
def profile(bench: Bench) -> dict[str, Any]:
    """Microseconds of a round by kernel, and launches: plain decoding and the largest tree."""
    _, draft = bench.pair()
    cases = {"plain": (None, TreeShape()), "60/5/10": (draft, TREES["60/5/10"])}
    return {
        name: kernels(bench, functools.partial(rounds, bench, *case, few=True), per="forwards")
        for name, case in cases.items()
    }


def kernels(bench: Bench, call: Callable[[], Any], per: str = "") -> dict[str, Any]:
    """The device's kernels of a call by name: [microseconds, launches], the slowest first. `per` forwards of a model,
    or the whole call."""
    call()
    bench.wait()
    activity = torch.profiler.ProfilerActivity.CUDA if bench.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        made = call()
        bench.wait()
    number = made[per] if per else 1
    found: dict[str, list[float]] = {}
    for event in trace.key_averages():
        us = event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
        found[event.key[:110]] = [round(us / number, 2), round(event.count / number, 2)]
    ranked = dict(sorted(found.items(), key=lambda one: -one[1][0])[:KERNELS])
    return {
        "us": round(sum(us for us, _ in found.values()), 1),
        "launches": sum(n for _, n in found.values()),
        "kernels": ranked,
    }


@section(30)
def products(bench: Bench) -> dict[str, Any]:
    """Products of few rows in a graph, matrices apart and together: microseconds a layer; and an empty kernel's."""
    apart = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (12288, 4096),
             "up": (12288, 4096), "down": (4096, 12288)}  # fmt: skip
    together = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
    layers, found = 2 if bench.small else 6, {}
    for name, shapes in {"apart": apart, "together": together, "head": {"head": (151936, 4096)}}.items():
        shapes = (
            {key: (rows // 64, columns // 64) for key, (rows, columns) in shapes.items()} if bench.small else shapes
        )
        kept = [
            [torch.randn(*shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes.values()]
            for _ in range(1 if name == "head" else layers)
        ]
        least = 1e6 * sum(one.nbytes for one in kept[0]) / bench.bytes_per_s
        for rows in (1, 2, 4, 8, 16, 32, 60, 64, 128):
            inputs = {size: torch.randn(rows, size, device=bench.device, dtype=torch.bfloat16)
                      for size in {one.shape[1] for one in kept[0]}}  # fmt: skip
            us = 1e3 * graph_ms(bench, lambda kept=kept, inputs=inputs: [
                F.linear(inputs[one.shape[1]], one) for layer in kept for one in layer
            ]) / len(kept)  # fmt: skip
            found[f"{name}, {rows}"] = {"us": round(us, 1), "ceiling": round(least, 1), "share": round(least / us, 3)}
    small = torch.zeros(4096, device=bench.device)
    found["empty kernel"] = {"us": graph_ms(bench, lambda: [small.add_(1) for _ in range(1000)])}
    return found


def graph_ms(bench: Bench, call: Callable[[], Any]) -> float:
    """Milliseconds of a call that is captured and replayed."""
    if not bench.on_gpu:
        return bench.ms(call)
    call()
    bench.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return bench.ms(graph.replay)


# -- training ----------------------------------------------------------------------------------------------------------


def train_args(trainer: str, shape: str, where: torch.device) -> argparse.Namespace:
    return argparse.Namespace(trainer=trainer, shape=shape, dtype="bfloat16", device=str(where), ttt_steps=7)


def documents(lengths: Sequence[int], turns: int, args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Random documents on the host: all rows supervised, or the last two thirds of each of several turns."""
    size = train_step_worker.SHAPES[args.shape][0]
    chance, made = torch.Generator().manual_seed(0), []
    for length in lengths:
        turn = torch.arange(length) % (length // turns)
        made.append({
            "ids": torch.randint(0, 500, (length,), generator=chance),
            "mask": turn >= (length // turns // 3 if turns > 1 else 0),
            "taps": torch.randn(length, 3, size, generator=chance).bfloat16(),
            "last": torch.randn(length, size, generator=chance).bfloat16(),
        })  # fmt: skip
    return made


def training(
    bench: Bench, trainer: str, lengths: Sequence[int], turns: int = 1, goal: float | None = None
) -> dict[str, Any]:
    """Milliseconds of a step among steps in a row, and peak memory."""
    bench.drop_pair()
    args = train_args(trainer, "tiny" if bench.small else "qwen3-8b", bench.device)
    lengths = [length // 32 for length in lengths] if bench.small else lengths
    torch.manual_seed(0)
    step = train_step_worker.fledge(args, documents(lengths, turns, args))
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ms = bench.ms(step, 6)
    ceiling = 1e3 * sum(lengths) * train_step_worker.flop_per_token(args) / bench.flops
    found = {"step": figure(ms, ceiling, "ms", goal=goal), "tok_per_s": 1e3 * sum(lengths) / ms}
    if bench.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@section(30)
def train_2048(bench: Bench) -> dict[str, Any]:
    """A training step of 2048 tokens, all steps of all rows."""
    return training(bench, "fledge", [2048], goal=55)


@section(30)
def train_2048_depths(bench: Bench) -> dict[str, Any]:
    """A training step of 2048 tokens, depths at random."""
    return training(bench, "fledge-depths", [2048], goal=33)


@section(40)
def train_turns(bench: Bench) -> dict[str, Any]:
    """A training step of four documents of 2048 tokens in six turns, depths at random."""
    return training(bench, "fledge-depths", [2048] * 4, turns=6, goal=110)


@section(60)
def train_profile(bench: Bench) -> dict[str, Any]:
    """Microseconds of a training step by kernel: all steps of all rows, and four documents at random depths."""
    bench.drop_pair()
    found, cases = {}, {"2048": ("fledge", [2048], 1), "turns": ("fledge-depths", [2048] * 4, 6)}
    for name, (trainer, lengths, turns) in cases.items():
        lengths = [length // 32 for length in lengths] if bench.small else lengths
        args = train_args(trainer, "tiny" if bench.small else "qwen3-8b", bench.device)
        found[name] = kernels(bench, train_step_worker.fledge(args, documents(lengths, turns, args)))
    return found


@section(90)
def head(bench: Bench) -> dict[str, Any]:
    """A real target with its head (--target, --draft): acceptance length and speed-up by temperature and tree."""
    if bench.target is None or bench.draft is None:
        raise LeftOut("no --target and --draft")
    import json

    from fledge.cli import main as fledge

    found = {}
    largest = ["--total-token", "60", "--depth", "5", "--top-k", "10"]
    cases = {"temperature 0": ["0"], "temperature 1": ["1"], "temperature 0, tree 60/5/10": ["0", *largest]}
    questions, tokens = ("1", "8") if bench.small else ("6", "128")
    for name, law in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            words = ["bench", "--target", str(bench.target), "--draft", str(bench.draft), "--bench-name", "quick"]
            more = ["--question-end", questions, "--max-new-tokens", tokens, "--temperature", *law]
            try:
                fledge([*words, *more, "--output-dir", folder, *([] if bench.on_gpu else ["--num-gpus-total", "0"])])
            except SystemExit as end:
                assert not end.code, f"fledge bench ended with {end.code}"
            found[name] = json.loads((Path(folder) / "summary.json").read_text())
    return found


@section(20)
def attention(bench: Bench) -> dict[str, Any]:
    """Which attention kernel is chosen (0 math, 1 flash, 2 efficient, 3 cuDNN), and what a new length costs."""
    many, few = (200, 40) if bench.small else (2048, 768)
    cases = {  # query heads, key heads, rows, keys, mask, causal
        "verify 60": (8, 8, 240, few, True, False), "plain": (8, 8, 4, few, True, False),
        "draft 10": (8, 8, 40, few, True, False), "prefill": (32, 8, many, many, False, True),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (heads, groups, rows, keys, masked, causal) in cases.items():
        for extra in (0, 1):
            rows = rows if masked else keys + extra
            q = torch.randn(1, heads, rows, 128, device=bench.device, dtype=torch.bfloat16)
            k = torch.randn(1, groups, keys + extra, 128, device=bench.device, dtype=torch.bfloat16)
            mask = torch.zeros(1, 1, rows, keys + extra, device=bench.device, dtype=torch.bfloat16) if masked else None
            more: Any = {"attn_mask": mask, "is_causal": causal, "enable_gqa": heads != groups}
            bench.wait()
            timer = Timer(torch.device("cpu"))
            timer.lap("begin")
            F.scaled_dot_product_attention(q, k, k, **more)
            bench.wait()
            timer.lap("first")
            kind = torch._fused_sdp_choice(q, k, k, **more) if bench.on_gpu else None
            us = 1e3 * bench.ms(lambda q=q, k=k, more=more: F.scaled_dot_product_attention(q, k, k, **more))
            found[f"{name}, {keys + extra} keys"] = {
                "kernel": kind, "first_ms": 1e3 * timer.seconds()["first"], "us": us
            }  # fmt: skip
    return found


# -- what comes next ---------------------------------------------------------------------------------------------------


@section(45)
def batch(bench: Bench) -> dict[str, Any]:
    """Four sequences at once: plain, and the largest tree."""
    _, draft = bench.pair()
    return {"plain": rounds(bench, None, TreeShape(), 4), "60/5/10": rounds(bench, draft, TREES["60/5/10"], 4)}


@section(45)
def sampling(bench: Bench) -> dict[str, Any]:
    """A round of the largest tree at temperature 1 with top-p 0.9: what choosing costs."""
    _, draft = bench.pair()
    return rounds(bench, draft, TREES["60/5/10"], sampling=Sampling(1.0, 0.9, seed=1))


@section(60)
def long(bench: Bench) -> dict[str, Any]:
    """Plain decoding and the largest tree behind 8192 tokens."""
    _, draft = bench.pair()
    length = 100 if bench.small else 8192
    return {
        "plain": rounds(bench, None, TreeShape(), prompt=length),
        "60/5/10": rounds(bench, draft, TREES["60/5/10"], prompt=length),
    }


@section(25)
def train_512(bench: Bench) -> dict[str, Any]:
    """A training step of 512 tokens, all steps of all rows."""
    return training(bench, "fledge", [512])


@section(40)
def train_8192(bench: Bench) -> dict[str, Any]:
    """A training step of one document of 8192 tokens, all steps of all rows."""
    return training(bench, "fledge", [8192])


@section(30)
def waits(bench: Bench) -> dict[str, Any]:
    """Where a training step waits for the device, by torch's own count."""
    if not bench.on_gpu:
        raise LeftOut("torch counts this on a GPU; tests/train/test_device.py does on an emulated one")
    bench.drop_pair()
    args = train_args("fledge-depths", "qwen3-8b", bench.device)
    step = train_step_worker.fledge(args, documents([1024], 2, args))
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in seen)
    return {"waits": sum(places.values()), "where": dict(places)}


@section(20)
def muon(bench: Bench) -> dict[str, Any]:
    """A step of Muon and AdamW on the head's weights, to be paid once for all tokens of an optimisation step."""
    from fledge.train.muon import MuonWithAuxiliary, split_parameters

    draft = copy.deepcopy(bench.pair()[1]).float().requires_grad_()
    matrices, rest = split_parameters(draft)
    optimizer = MuonWithAuxiliary(
        matrices, rest, lambda left: torch.optim.AdamW(left, lr=1e-4, fused=True), lr=1e-4, weight_decay=0.0
    )
    for parameter in (*matrices, *rest):
        parameter.grad = torch.randn_like(parameter)
    return {"ms": bench.ms(optimizer.step, 3)}


# -- what several GPUs would use, on one -------------------------------------------------------------------------------


@section(30)
def one_rank(bench: Bench) -> dict[str, Any]:
    """Training under DDP and FSDP2 in a process group of one (NCCL; gloo on a CPU): losses as without."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def ddp(module: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.parallel.DistributedDataParallel(module)

    def fsdp(module: torch.nn.Module) -> torch.nn.Module:
        return fully_shard(module, mesh=init_device_mesh(bench.device.type, (1,)))  # type: ignore[return-value]

    backend = "nccl" if bench.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        losses = {}
        for name, wrap in {"alone": lambda module: module, "ddp": ddp, "fsdp": fsdp}.items():
            torch.manual_seed(0)
            args = train_args("fledge-depths", "tiny", bench.device)
            step = train_step_worker.fledge(args, documents([96, 160], 2, args), wrap=wrap)
            losses[name] = [float(step()) for _ in range(3)]
    finally:
        dist.destroy_process_group()
    worst = max(
        abs(a - b) / abs(b) for name in ("ddp", "fsdp") for a, b in zip(losses[name], losses["alone"], strict=True)
    )
    assert worst < 0.01, f"losses differ by {worst:.1%}: {losses}"
    return {"backend": backend, "largest_difference": worst}


@section(60)
def ray_workers(bench: Bench) -> dict[str, Any]:
    """Two Ray workers that share the card (half a GPU each) answer as this process does."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise LeftOut("ray is not installed") from None
    from fledge.workers import run_jobs

    lengths = (3, 9, 20)
    found = dict(
        run_jobs(
            TinyEngine,
            answer,
            lengths,
            num_workers=2,
            gpus_per_worker=0.5 if bench.on_gpu else 0,
        )  # fmt: skip
    )
    alone = TinyEngine()
    assert found == {length: answer(alone, length) for length in lengths}
    return {"jobs": len(found)}


class TinyEngine:
    """What a worker loads."""

    def __init__(self) -> None:
        tiny = tiny_module()
        where = "cuda" if torch.cuda.is_available() else "cpu"
        self.target = Target(tiny.tiny_model("qwen3").to(where), tap_layers=(1, 2, 3), name="qwen3")
        self.draft = tiny.tiny_draft(self.target).to(where)


def answer(engine: TinyEngine, length: int) -> list[int]:
    """A worker's job."""
    prompts = [tiny_module().prompt(length)]
    return generate_batch(engine.target, engine.draft, prompts, max_new_tokens=12, eos_token_ids=())[0].token_ids


@section(40)
def spread(bench: Bench) -> dict[str, Any]:
    """`--num-gpus-per-model`: a target placed by a device map answers as one that was loaded whole."""
    tiny = tiny_module()
    from saved_target import save_target

    answers = []
    with tempfile.TemporaryDirectory() as folder:
        save_target(Path(folder), "qwen3")
        for places in ({"device": bench.device}, {"device_map": "auto" if bench.on_gpu else {"": "cpu"}}):
            target = Target.from_pretrained(folder, tap_layers=(1, 2, 3), **places)
            made = generate_batch(target, None, [tiny.prompt(9)], max_new_tokens=12, eos_token_ids=())
            answers.append(made[0].token_ids)
    assert answers[0] == answers[1], answers
    return {"tokens": len(answers[0])}
