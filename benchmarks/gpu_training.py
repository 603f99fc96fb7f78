"""Sections of on_gpu.py: training steps, extraction, and whether both are right."""

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train_step_worker
from gpu_bench import Bench, LeftOut, figure, kernels, section, tiny_module

from fledge.target.model import Target


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
