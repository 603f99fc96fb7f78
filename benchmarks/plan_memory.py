"""The memory that `fledge plan` states for a training step beside what a step allocates and how its process grows.

    python benchmarks/plan_memory.py --rows 512 2048

SmolLM2 shapes on CPU, one document with every row supervised, TTT 7 to full depth and to depths at random, AdamW for
all weights (with Muon the moments are the smaller ones that tests/test_plan.py counts). `allocated` is the peak of the
tensors' bytes within a step, as a GPU's allocator counts them: the plan is to be within 15 % of it, else this ends with
status 1. `growth` is that of the process, moments included, with what the C heap leaves unused between the tensors; it
is told, not judged.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import train_step_worker
from torch.profiler import ProfilerActivity, profile

from fledge.drafters.eagle3.config import DraftConfig
from fledge.train.memory import step_memory

WORKER = Path(__file__).with_name("train_step_worker.py")
WITHIN = 0.15
TRAINERS = {"fledge": 1.0, "fledge-depths": train_step_worker.SURVIVAL}
SMOLLM2 = DraftConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    vocab_size=49152, draft_vocab_size=8192, tap_layers=(2, 15, 27),
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    missed = False
    for trainer, dtype, rows in itertools.product(TRAINERS, args.dtype, args.rows):
        step = step_memory(
            SMOLLM2, rows=rows, bf16=dtype == "bfloat16", device_type="cpu", muon=False, survival=TRAINERS[trainer]
        )
        always = step.weights + step.batch
        with tempfile.TemporaryDirectory() as folder:
            documents = Path(folder) / "documents.json"
            documents.write_text(json.dumps([{"ids": list(range(rows)), "mask": [1] * rows}]))
            found = allocated(trainer, documents, dtype, args.threads)
            grown = growth(trainer, documents, dtype, args.threads)
        whole = step.peak - always  # weights and batch are there before a step
        planned = whole - step.moments
        missed |= abs(planned / found - 1) > WITHIN
        print(
            f"{trainer:13} {dtype:8} {rows:5} rows: planned {planned / 2**20:4.0f} MiB, allocated {found / 2**20:4.0f} "
            f"({planned / found:.2f}); with moments: planned {whole / 2**20:4.0f}, growth {grown / 2**20:4.0f} "
            f"({whole / grown:.2f})"
        )
    sys.exit(int(missed))


def allocated(trainer: str, documents: Path, dtype: str, threads: int) -> int:
    """Bytes of tensors at the peak of a step, above what was there before it (weights, moments, batch)."""
    torch.set_num_threads(threads)
    args = argparse.Namespace(
        trainer=trainer, shape="smollm2", dtype=dtype, device="cpu", ttt_steps=7, documents=documents
    )
    step = train_step_worker.fledge(args, train_step_worker.documents(args))
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    trace = documents.with_name("trace.json")
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def growth(trainer: str, documents: Path, dtype: str, threads: int) -> float:
    """Bytes by which a process of its own grows over two steps."""
    words = [sys.executable, str(WORKER), trainer, "--documents", str(documents), "--dtype", dtype, "--steps", "1",
             "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["growth_mib"] * 2**20


if __name__ == "__main__":
    main()
