"""Sections of on_gpu.py: a user's commands, and what several GPUs would use, on one."""

import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import train_step_worker
from gpu_bench import Bench, LeftOut, section, tiny_module
from gpu_training import documents, train_args

from fledge.decoding.generate import generate_batch
from fledge.target.model import Target


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
        names = ("extract", "train --states", "bench", "decode") if bench.small else words
        found = {name: how_it_ended([str(word) for word in words[name]]) for name in names}
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
