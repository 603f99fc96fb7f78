"""The memory that `fledge plan` states for a training step beside the measured growth of a process.

    python benchmarks/plan_memory.py --rows 512 2048

SmolLM2 shapes on CPU, one document with every row supervised, TTT 7. Growth counts from before the first step to the
peak, so moments, gradients, activations and the loss are in it; weights and batch are there before. AdamW steps all
weights here (with Muon the moments are the smaller ones that tests/test_plan.py counts).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fledge.draft.config import DraftConfig
from fledge.train.memory import step_memory

WORKER = Path(__file__).with_name("train_step_worker.py")
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
    for dtype in args.dtype:
        for rows in args.rows:
            step = step_memory(SMOLLM2, rows=rows, bf16=dtype == "bfloat16", device_type="cpu", muon=False)
            planned = (step.peak - step.weights - step.batch) / 2**20
            found = measured(rows, dtype, args.threads)
            print(f"{dtype:8} {rows:5} rows: planned {planned:6.0f} MiB, measured {found:6.0f} ({planned / found:.2f})")


def measured(rows: int, dtype: str, threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.json"
        path.write_text(json.dumps([{"ids": list(range(rows)), "mask": [1] * rows}]))
        done = subprocess.run(
            [sys.executable, str(WORKER), "fledge", "--documents", str(path), "--dtype", dtype, "--steps", "1",
             "--threads", str(threads)], capture_output=True, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])["growth_mib"]


if __name__ == "__main__":
    main()
