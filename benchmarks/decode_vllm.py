"""Decoding beside vLLM's CPU build: same target, head, prompts, number format and cores.

    tests/engines/setup_vllm.sh VENV
    python benchmarks/decode_vllm.py SMOLLM2_DIR HEAD --bench-dir QUESTIONS --vllm-python VENV/bin/python \\
        --out benchmarks/decode_vllm_2core-cpu_202611

Greedy, or at --temperature, and no end of text: every answer has --new-tokens tokens. Seconds are those of the whole
request, prompt included (vLLM in process, without HTTP). vLLM holds one set-up at a time: plain, then the head with
chains of K = 1, 2 ..; the processes stay loaded while prompts are taken in turns by it, by our plain decoding and by
our own choice of a tree.
So every set-up of vLLM has our speeds of the same minutes beside it, and ratios are over single prompts: median and
quartiles. `--at-once 4 16 64` answers so many prompts together, with vLLM plain and its best chain.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fledge import provenance
from fledge.bench.prompts import load_questions, turn_text
from fledge.decoding.default_tree import default_tree
from fledge.decoding.generate import Sampling, generate, generate_batch
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.config import from_json
from fledge.target.model import Target

WORKER = Path(__file__).with_name("decode_vllm_worker.py")
SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")
PLAIN, OWN = "fledge plain", "fledge own choice"
WARM_UP = 8  # tokens of the turn that is not counted

Way = Callable[[list[list[int]], int], float]  # (prompts, new tokens) -> seconds for all of them at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="target folder")
    parser.add_argument("head", type=Path, help="head folder, EAGLE names")
    parser.add_argument("--bench-dir", type=Path, required=True, help="folder of <set>/question.jsonl")
    parser.add_argument("--vllm-python", required=True, help="Python of the environment with vLLM")
    parser.add_argument("--prompts", type=int, default=8, help="in all, evenly from the four sets")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="K of vLLM with the head")
    parser.add_argument("--at-once", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--temperature", type=float, default=0.0, help="of both; 0: greedy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(
        str(args.model), dtype=getattr(torch, args.dtype), device="cpu",
        tap_layers=from_json(args.head / "config.json").tap_layers,
    )  # fmt: skip
    prompts = prompts_of(target, args)
    draft = load_draft(args.head, target.embedding_weight)
    sampling = Sampling(args.temperature, seed=0)
    ours = {PLAIN: way_of(target, None, sampling), OWN: way_of(target, draft, sampling)}
    results: dict[str, dict[str, list[float]]] = {}  # tokens per second by set-up, way and turn
    for chain in (0, *args.chains):
        results[setup_name(chain, 1)] = beside_vllm(chain, ours, [[prompt] for prompt in prompts], args)
        print(table({setup_name(chain, 1): results[setup_name(chain, 1)]}), flush=True)
    best = max(args.chains, key=lambda k: statistics.median(results[setup_name(k, 1)]["vLLM"]), default=0)
    for number in args.at_once:
        together = [(prompts * number)[:number]]
        for chain in {0: None, best: None}:
            results[setup_name(chain, number)] = beside_vllm(chain, ours, together, args)
            print(table({setup_name(chain, number): results[setup_name(chain, number)]}), flush=True)
    if args.out:
        provenance.write(args.out.with_suffix(".json"), vars(args), tokens_per_s=results)
        args.out.with_suffix(".md").write_text(f"{__doc__}\n{table(results)}\n", encoding="utf-8")


def beside_vllm(
    chain: int, ours: dict[str, Way], batches: Sequence[list[list[int]]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens per second of every way, turn by turn, with one set-up of vLLM."""
    vllm = Vllm(chain, len(batches[0]), args)
    ways: dict[str, Way] = {"vLLM": vllm.seconds, **ours}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    try:
        for decode in ways.values():
            decode(batches[0], WARM_UP)
        for turn in range(args.rounds * len(batches)):
            batch, first = batches[turn % len(batches)], turn % len(names)
            for way in names[first:] + names[:first]:
                speeds[way].append(args.new_tokens * len(batch) / ways[way](batch, args.new_tokens))
    finally:
        vllm.close()
    return speeds


# -- the sides ---------------------------------------------------------------------------------------------------------


def way_of(target: Target, draft: Any, sampling: Sampling) -> Way:
    def decode(prompts: list[list[int]], new_tokens: int) -> float:
        start = time.perf_counter()
        tree, budget = default_tree(target, draft, at_once=len(prompts))
        options: dict[str, Any] = {
            "tree": tree, "max_new_tokens": new_tokens, "eos_token_ids": (), "sampling": sampling,
        }  # fmt: skip
        if len(prompts) == 1:
            generate(target, draft, prompts[0], budget=budget, **options)
        else:
            generate_batch(target, draft, prompts, **options)
        return time.perf_counter() - start

    return decode


class Vllm:
    """One set-up of vLLM in a process of its own."""

    def __init__(self, chain: int, at_once: int, args: argparse.Namespace) -> None:
        facts = {
            "model": str(args.model), "head": str(args.head) if chain else None, "chain": chain, "dtype": args.dtype,
            "at_once": at_once, "temperature": args.temperature,
        }  # fmt: skip
        cores = f"0-{args.threads - 1}"
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1800",  # it compiles first
        }  # fmt: skip
        for ours in ("PYTHONPATH", "OMP_NUM_THREADS"):
            environment.pop(ours, None)
        self._process = subprocess.Popen(
            [args.vllm_python, str(WORKER), json.dumps(facts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, text=True,
        )  # fmt: skip
        self._answer()

    def seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("vLLM's process has ended; its messages are above.")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def prompts_of(target: Target, args: argparse.Namespace) -> list[list[int]]:
    """First turns of the first questions of every set, in the target's chat template."""
    each = -(-args.prompts // len(SETS))
    questions = [load_questions(name, bench_dir=args.bench_dir, end=each) for name in SETS]
    texts = [turn_text(question.turns[0]) for row in zip(*questions, strict=True) for question in row]
    asked = [[{"role": "user", "content": text}] for text in texts[: args.prompts]]
    return [target.tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]


# -- the report --------------------------------------------------------------------------------------------------------


def setup_name(chain: int, at_once: int) -> str:
    head = f"chain of {chain}" if chain else "plain"
    return f"vLLM {head}, {at_once} at once"


def table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| set-up of vLLM | vLLM tok/s | plain tok/s | own choice tok/s | plain / vLLM | own / vLLM | own / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for setup, speeds in results.items():
        medians = [f"{statistics.median(speeds[way]):.1f}" for way in ("vLLM", PLAIN, OWN)]
        pairs = ((PLAIN, "vLLM"), (OWN, "vLLM"), (OWN, PLAIN))
        ratios = [spread([a / b for a, b in zip(speeds[one], speeds[other], strict=True)]) for one, other in pairs]
        lines.append(f"| {setup} | " + " | ".join([*medians, *ratios]) + " |")
    return "\n".join(lines)


def spread(ratios: Sequence[float]) -> str:
    """The median with the quartiles."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
