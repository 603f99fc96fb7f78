"""Tree decoding beside the EAGLE repository's, as AngelSlim ships it: same head, prompts, trees, machine.

    python benchmarks/decode_peers.py SMOLLM2_DIR HEAD --bench-dir QUESTIONS --peer-python PEER_VENV/bin/python \\
        --out benchmarks/decode_peers_2core-cpu_202611

Greedy, no end of text, so every way decodes the same number of tokens. Plain decoding, our rounds of exact and of
fixed shapes and the peer take one prompt after another in turns, in several rounds after one short one that is not
counted. tok/s are the tokens after the first over the time after the prompt; what a last round brings beyond
--new-tokens counts for nobody, its time does. tok/s are medians over rounds of all prompts, ratios medians over single
answers with their extremes. Token ids must agree in float32; in bfloat16, where two tokens can tie within rounding, the
prompts on which they do are counted.

The peer runs in a process of its own, with the Python of an environment made for it, and stays loaded:

    python -m venv PEER_VENV; PEER_VENV/bin/pip install torch==2.13.0 transformers==4.57.6
    PEER_VENV/bin/pip install --no-deps angelslim==0.5.0

decode_peers_worker.py says what stands around its code there. Both sides call the tree (total_token, depth, top_k) the
same: total_token counts the root, and depth the levels after the first.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge import provenance
from fledge.bench.prompts import dataset_label, load_questions, turn_text
from fledge.decoding.generate import generate_batch
from fledge.decoding.records import Generation, Sampling
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.config import from_json
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

WORKER = Path(__file__).with_name("decode_peers_worker.py")
SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")
TREES = ((60, 7, 10), (8, 2, 3))
WARM_UP = 8  # tokens of the round that is not counted


@dataclass(frozen=True)
class Run:
    """One answer."""

    token_ids: list[int]  # the peer's lacks its very last one
    rounds: int  # target forwards after the prompt
    prefill_s: float
    decode_s: float


Ways = dict[str, Callable[[list[int], int], Run]]  # (prompt, new tokens) -> answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="target folder")
    parser.add_argument("head", type=Path, help="head folder, EAGLE names")
    parser.add_argument("--bench-dir", type=Path, help="folder of <set>/question.jsonl")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--prompts", type=int, default=8, help="in all, evenly from the sets")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tree", type=int, nargs=3, action="append", metavar=("TOTAL_TOKEN", "DEPTH", "TOP_K"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer-python", help="Python of the environment with angelslim; without it the peer is left out"
    )
    parser.add_argument("--as-released", action="store_true", help="also the peer with its own scores; see the worker")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results, peer = {}, None
    for dtype in args.dtype:
        results[dtype], peer = run_case(dtype, args)
        print(table({dtype: results[dtype]}), flush=True)
    if args.out:
        write(args, results, peer)


def run_case(dtype: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str] | None]:
    """All ways with one number format, and the peer's versions."""
    target, draft = load_pair(args.model, args.head, dtype)
    prompts = prompts_of(target, args)
    trees = [TreeShape(*numbers) for numbers in args.tree or TREES]
    ways: Ways = {"plain": ours(target, None, trees[0], "exact")}
    peer = Peer(dtype, args) if args.peer_python else None
    for tree in trees:
        for shapes in ("exact", "fixed"):
            ways[f"{name_of(tree)} {shapes}"] = ours(target, draft, tree, shapes)
        if peer:
            ways[f"{name_of(tree)} peer"] = peer.way(tree)
            if args.as_released:
                ways[f"{name_of(tree)} peer as released"] = peer.way(tree, as_released=True)
    if not peer:
        print("the peer is left out: no --peer-python")
    try:
        runs = in_turns(ways, prompts, args.new_tokens, args.rounds)
    finally:
        if peer:
            peer.close()
    return {way: summary(way, runs, args.new_tokens) for way in ways}, peer.versions if peer else None


def in_turns(ways: Ways, prompts: Sequence[list[int]], new_tokens: int, rounds: int) -> dict[str, list[list[Run]]]:
    """Every way's answers by round and prompt. Each prompt's ways begin with another one, lest one always be second."""
    for decode in ways.values():
        decode(max(prompts, key=len), WARM_UP)
    runs: dict[str, list[list[Run]]] = {way: [] for way in ways}
    names = list(ways)
    for _ in range(rounds):
        for way in names:
            runs[way].append([])
        for turn, prompt in enumerate(prompts):
            first = turn % len(names)
            for way in names[first:] + names[:first]:
                runs[way][-1].append(ways[way](prompt, new_tokens))
    return runs


# -- the sides ---------------------------------------------------------------------------------------------------------


def load_pair(model: Path, head: Path, dtype: str) -> tuple[Target, DraftModel]:
    taps = from_json(head / "config.json").tap_layers
    target = Target.from_pretrained(str(model), dtype=getattr(torch, dtype), device="cpu", tap_layers=taps)
    return target, load_draft(head, target.embedding_weight)


def prompts_of(target: Target, args: argparse.Namespace) -> list[list[int]]:
    """First turns of the first questions of every set, in the target's chat template."""
    each = -(-args.prompts // len(args.sets))
    questions = [load_questions(name, bench_dir=args.bench_dir, end=each) for name in args.sets]
    texts = [turn_text(question.turns[0]) for row in zip(*questions, strict=True) for question in row]
    asked = [[{"role": "user", "content": text}] for text in texts[: args.prompts]]
    return [target.tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]


def ours(target: Target, draft: DraftModel | None, tree: TreeShape, shapes: Any) -> Callable[[list[int], int], Run]:
    def decode(prompt: list[int], new_tokens: int) -> Run:
        made = generate_batch(
            target, draft, [prompt], tree=tree, max_new_tokens=new_tokens, sampling=Sampling(), eos_token_ids=(),
            shapes=shapes,
        )  # fmt: skip
        return run_of(made[0])

    return decode


def run_of(made: Generation) -> Run:
    return Run(made.token_ids, made.num_forwards, made.ttft_s, made.decode_s)


class Peer:
    """The worker process: a request is a line, so is its answer; between them it sleeps."""

    def __init__(self, dtype: str, args: argparse.Namespace) -> None:
        words = ["--model", args.model, "--head", args.head, "--dtype", dtype, "--threads", args.threads]
        self._process = subprocess.Popen(
            [args.peer_python, str(WORKER), *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def way(self, tree: TreeShape, *, as_released: bool = False) -> Callable[[list[int], int], Run]:
        def decode(prompt: list[int], new_tokens: int) -> Run:
            request = {
                "prompt": prompt, "tree": [tree.total_token, tree.depth, tree.top_k], "new_tokens": new_tokens,
                "as_released": as_released,
            }  # fmt: skip
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            made = self._answer()
            return Run(made["token_ids"][:new_tokens], len(made["accepted"]), made["prefill_s"], made["decode_s"])

        return decode

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with status {self._process.wait()}; what it said stands above.")
        return json.loads(line)


# -- what came out -----------------------------------------------------------------------------------------------------


def summary(way: str, runs: dict[str, list[list[Run]]], new_tokens: int) -> dict[str, Any]:
    """Speeds, tau, and the way against plain decoding and against the peer of its tree."""
    mine, counted = runs[way], new_tokens - 1  # the first token is the prompt's
    answers = [run for each in mine for run in each]
    row: dict[str, Any] = {
        "tok_per_s": statistics.median(len(each) * counted / sum(run.decode_s for run in each) for each in mine),
        "tok_per_s_with_prompt": statistics.median(
            len(each) * new_tokens / sum(run.prefill_s + run.decode_s for run in each) for each in mine
        ),
        "tau": len(answers) * counted / sum(run.rounds for run in answers),
        "prefill_ms": 1e3 * statistics.median(run.prefill_s for run in answers),
        "seconds": [[run.decode_s for run in each] for each in mine],
    }
    tree = way.split()[0]
    for name, other in (("plain", "plain"), ("peer", f"{tree} peer")):
        if other in runs and other != way:
            row[f"against_{name}"] = compared(mine, runs[other])
    return row


def compared(mine: list[list[Run]], other: list[list[Run]]) -> dict[str, Any]:
    """How many times as fast, answer by answer, and on how many prompts with the same tokens."""
    pairs = [pair for each in zip(mine, other, strict=True) for pair in zip(*each, strict=True)]
    speeds = [b.decode_s / a.decode_s for a, b in pairs]
    same = [same_tokens(a, b) for a, b in zip(mine[0], other[0], strict=True)]
    return {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds),
            "same_tokens": sum(same), "prompts": len(same)}  # fmt: skip


def same_tokens(one: Run, other: Run) -> bool:
    """Up to the token that the peer's answer lacks."""
    length = min(len(one.token_ids), len(other.token_ids))
    return one.token_ids[:length] == other.token_ids[:length]


def name_of(tree: TreeShape) -> str:
    return f"{tree.total_token}/{tree.depth}/{tree.top_k}"


def ratio(row: dict[str, Any], key: str) -> str:
    found = row.get(key)
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else "-"


def agreement(row: dict[str, Any], key: str) -> str:
    found = row.get(key)
    return f"{found['same_tokens']}/{found['prompts']}" if found else "-"


def table(results: dict[str, Any]) -> str:
    """Per number format one row for each way."""
    columns = (
        "tree, shapes", "tok/s", "with the prompt", "tau", "against plain", "tokens as plain", "against the peer",
        "tokens as the peer",
    )  # fmt: skip
    lines: list[str] = []
    for dtype, rows in results.items():
        lines += [f"## {dtype}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for way, row in rows.items():
            lines.append(
                f"| {way} | {row['tok_per_s']:.1f} | {row['tok_per_s_with_prompt']:.1f} | {row['tau']:.2f} | "
                f"{ratio(row, 'against_plain')} | {agreement(row, 'against_plain')} | {ratio(row, 'against_peer')} | "
                f"{agreement(row, 'against_peer')} |"
            )
        lines.append("")
    return "\n".join(lines)


def write(args: argparse.Namespace, results: dict[str, Any], peer: dict[str, str] | None) -> None:
    """The .json with everything, the .md for people; neither names folders of this machine."""
    config = {key: str(value) for key, value in vars(args).items() if key not in ("peer_python", "bench_dir")}
    config |= {key: Path(config[key]).name for key in ("model", "head", "out")}
    config["sets"] = ", ".join(map(dataset_label, args.sets))
    command = f"python benchmarks/decode_peers.py {config['model']} {config['head']} --peer-python PEER_VENV/bin/python"
    provenance.write(args.out.with_suffix(".json"), config, command=command, peer=peer, results=results)
    said = ", ".join(f"{name} {version}" for name, version in (peer or {}).items())
    ours_said = ", ".join(f"{name} {provenance.versions()[name]}" for name in ("torch", "transformers"))
    head = [
        "# Tree decoding beside the EAGLE repository's engine", "",
        f"{config['model']}, head {config['head']}, {args.prompts} prompts ({config['sets']}), {args.new_tokens} "
        f"new tokens, greedy, {args.threads} threads, {args.rounds} rounds in turns. Peer: {said or 'none'}. Ours: "
        f"{ours_said}. tok/s: medians over rounds; ratios: medians over answers (least to most), times as fast.", "",
    ]  # fmt: skip
    args.out.with_suffix(".md").write_text("\n".join(head) + table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
