"""One optimisation step of fledge beside SpecForge's and speculators': seconds, tokens per second, memory growth.

    python benchmarks/train_step.py --specforge PYTHON --speculators PYTHON --out benchmarks/train_step_2core-cpu_202611
    python benchmarks/train_step.py --case conversations --model SMOLLM2_DIR --data answers.jsonl --specforge PYTHON ...
    python benchmarks/train_step.py --case cuda --shape qwen3-8b --sequence 2048 --peak-tflops 790
    python benchmarks/train_step.py --draft-type dspark --case 512-bf16 --specforge PYTHON --speculators PYTHON

Each trainer runs in a process of its own with the Python given for it (train_step_worker.py says how each is set up,
train_block_worker.py for block drafts); a peer without one is left out, with a note. Rounds are taken in turns (ours, a
peer, the next peer, ours again ...), so that a busy machine slows all alike; medians over rounds count. Memory is the
growth of the process's peak from before the first step. `--clock cpu` counts the processes' CPU time instead of the
wall's: for machines that are not idle.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fledge import provenance

WORKERS = {
    "eagle3": Path(__file__).with_name("train_step_worker.py"),
    "dflash": Path(__file__).with_name("train_block_worker.py"),
    "dspark": Path(__file__).with_name("train_block_worker.py"),
}
CASES = {  # tokens of one document with every row supervised, dtype
    "512-fp32": (512, "float32"),
    "512-bf16": (512, "bfloat16"),
    "2048-fp32": (2048, "float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[*CASES, "conversations", "cuda"], default=list(CASES))
    parser.add_argument("--draft-type", choices=WORKERS, default="eagle3")
    parser.add_argument("--anchors", type=int, default=128, help="of a document, in block drafts")
    parser.add_argument("--specforge", help="Python of an environment with specforge 0.2")
    parser.add_argument("--speculators", help="Python of an environment with speculators 0.9")
    parser.add_argument("--model", help="target folder, for its tokenizer (conversations)")
    parser.add_argument("--data", help="conversations")
    parser.add_argument("--conversations", type=int, default=8, help="how many of them make one step")
    parser.add_argument("--shape", default="smollm2", help="smollm2, qwen3-8b or tiny")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of the cuda case")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of peak (cuda case)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process, after one that is not")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.case:
            results[name] = run_case(name, args, Path(folder))
            print(table({name: results[name]}, args), flush=True)
    if args.out:
        config = {key: str(value) for key, value in vars(args).items() if key not in ("specforge", "speculators")}
        config |= {key: Path(str(getattr(args, key))).name for key in ("model", "data", "out")}
        command = " ".join(("python benchmarks/train_step.py --draft-type", args.draft_type, "--case", *args.case))
        command += f" --clock {args.clock}"
        provenance.write(args.out.with_suffix(".json"), config, command=command, results=results)
        args.out.with_suffix(".md").write_text(table(results, args), encoding="utf-8")


def run_case(name: str, args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """All trainers on one input, in turns. Per trainer: medians and what they are medians of."""
    device, dtype = ("cuda", "bfloat16") if name == "cuda" else ("cpu", CASES.get(name, (0, "bfloat16"))[1])
    path = folder / f"{name}.json"
    documents = conversations(args) if name == "conversations" else [synthetic(name, args)]
    path.write_text(json.dumps(documents))
    trainers = {"fledge": sys.executable}
    unrolled = args.draft_type == "eagle3"
    if unrolled:
        trainers["fledge-depths"] = sys.executable
    if device == "cpu":
        for peer in ("specforge", "speculators"):
            if getattr(args, peer):
                trainers[peer] = getattr(args, peer)
            else:
                print(f"{peer} is left out: no --{peer} PYTHON")
        if unrolled and args.specforge and name != "conversations":
            trainers["specforge-compact"] = args.specforge
    runs: dict[str, list[dict]] = {trainer: [] for trainer in trainers}
    for _ in range(args.rounds):
        for trainer, python in trainers.items():
            runs[trainer].append(worker(python, trainer, path, dtype, device, args))
    tokens = sum(len(document["ids"]) for document in documents)
    supervised = sum(sum(document["mask"]) for document in documents)
    key = "cpu_seconds" if args.clock == "cpu" else "seconds"
    summary = {}
    for trainer, rounds in runs.items():
        seconds = [statistics.median(one[key]) for one in rounds]
        median = statistics.median(seconds)
        summary[trainer] = {
            "step_s": median, "tokens_per_s": tokens / median, "supervised_per_s": supervised / median,
            "growth_mib": statistics.median(one["growth_mib"] for one in rounds), "rounds_s": seconds,
            "wall_s": [statistics.median(one["seconds"]) for one in rounds],
            "cpu_s": [statistics.median(one["cpu_seconds"]) for one in rounds],
        }  # fmt: skip
        if args.peak_tflops and device == "cuda" and unrolled:
            summary[trainer]["share_of_peak"] = tokens * rounds[0]["flop_per_token"] / median / args.peak_tflops / 1e12
    return summary


def worker(python: str, trainer: str, path: Path, dtype: str, device: str, args: argparse.Namespace) -> dict:
    command = [
        python, str(WORKERS[args.draft_type]), trainer, "--documents", str(path), "--dtype", dtype, "--device", device,
        "--shape", args.shape, "--threads", str(args.threads), "--steps", str(args.steps),
    ]  # fmt: skip
    if args.draft_type != "eagle3":
        command += ["--draft-type", args.draft_type, "--anchors", str(args.anchors)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{trainer} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def synthetic(name: str, args: argparse.Namespace) -> dict:
    """One document of random tokens, every row supervised."""
    length = CASES[name][0] if name in CASES else args.sequence
    return {"ids": [random.Random(row).randrange(500) for row in range(length)], "mask": [1] * length}


def conversations(args: argparse.Namespace) -> list[dict]:
    """The first conversations of the data, tokenised as `fledge train` does."""
    from fledge.data.dataset import TokenizedData
    from fledge.data.tokenize import ChatTemplate

    if not args.model or not args.data:
        raise SystemExit("--case conversations needs --model (for the tokenizer) and --data.")
    data = TokenizedData.from_path(args.data, ChatTemplate.from_pretrained(args.model), max_length=512, cache_dir=None)
    chosen = [data[index] for index in range(args.conversations)]
    return [{"ids": sample.input_ids.tolist(), "mask": sample.loss_mask.int().tolist()} for sample in chosen]


def table(results: dict[str, dict[str, dict]], args: argparse.Namespace) -> str:
    """Per case one row for each trainer, and fledge against the better peer."""
    draft = "TTT 7" if args.draft_type == "eagle3" else f"{args.draft_type}, {args.anchors} anchors of a document"
    lines = [f"# One optimisation step, {draft}", "", f"Medians over rounds in turns; {args.clock} time.", ""]
    for name, trainers in results.items():
        columns = "| trainer | s | tok/s | supervised tok/s | memory growth, MiB |"
        lines += [f"## {name}", "", columns, "|---|---|---|---|---|"]
        for trainer, row in trainers.items():
            lines.append(
                f"| {trainer} | {row['step_s']:.2f} | {row['tokens_per_s']:.0f} | {row['supervised_per_s']:.0f} | "
                f"{row['growth_mib']:.0f} |"
            )
        peers = [row for trainer, row in trainers.items() if not trainer.startswith("fledge")]
        lines.append("")
        for name, ours in trainers.items() if peers else ():
            if name.startswith("fledge"):
                speed = ours["tokens_per_s"] / max(row["tokens_per_s"] for row in peers)
                memory = ours["growth_mib"] / min(row["growth_mib"] for row in peers)
                lines.append(
                    f"{name}: {speed:.2f} x the faster peer, {memory:.2f} x the leaner peer's memory growth.  "
                )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
