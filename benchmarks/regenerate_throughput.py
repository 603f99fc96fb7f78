"""`fledge regenerate` beside `vllm bench serve`: same server, prompts, lengths and concurrency, in turns.

    python benchmarks/regenerate_throughput.py --model DIR --prompts prompts.jsonl --vllm .venv-vllm/bin/vllm \\
        --out benchmarks/regenerate_vllm_2core-cpu_202611

Greedy answers make the lengths equal. Reported: output tokens per second of both (as each measures itself, start-up of
the programs excluded) and the CPU time each client used, start-up included.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fledge import provenance
from fledge.servers.processes import ServerSettings, plan, running, visible_gpus

RATE = re.compile(r"(\d+) answer tokens \(([\d.]+) tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="ShareGPT rows")
    parser.add_argument("--vllm", default=os.environ.get("FLEDGE_VLLM") or "vllm")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8131)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = write_prompts(args, Path(folder))
        serve = ServerSettings(
            target=args.model, base_port=args.port, max_model_len=1024, output_dir=Path(folder),
            vllm=args.vllm, vllm_args=("--dtype", "bfloat16", "--enforce-eager", "--served-model-name", "target"),
        )  # fmt: skip
        servers = plan(serve, visible_gpus(None))[:1]
        rounds = []
        with running(servers):
            fledge_round(args, ours, Path(folder) / "warm")  # the first requests of a server are slow
            for number in range(args.rounds):
                pair = {"fledge": lambda n=number: fledge_round(args, ours, Path(folder) / f"out{n}"),
                        "vllm bench": lambda: vllm_round(args, theirs, Path(folder))}  # fmt: skip
                order = list(pair) if number % 2 == 0 else list(pair)[::-1]  # neither always has the second place
                rounds.append({name: pair[name]() for name in order})
                print(json.dumps(rounds[-1]), flush=True)
    report(args, rounds)


def write_prompts(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The same prompts for either client."""
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()[: args.num_prompts]]
    rows = [{"id": row["id"], "conversations": row["conversations"][:1]} for row in rows]
    ours, theirs = folder / "ours.jsonl", folder / "theirs.jsonl"
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = (json.dumps({"prompt": row["conversations"][0]["value"]}) + "\n" for row in rows)
    theirs.write_text("".join(lines), encoding="utf-8")
    return ours, theirs


def fledge_round(args: argparse.Namespace, prompts: Path, out: Path) -> dict[str, float]:
    finished, cpu_s, wall_s = timed(
        [sys.executable, "-m", "fledge", "regenerate", "--data", str(prompts), "--output-dir", str(out),
         "--endpoints", f"127.0.0.1:{args.port}", "--concurrency", str(args.concurrency), "--temperature", "0",
         "--max-tokens", str(args.max_tokens)]
    )  # fmt: skip
    found = RATE.search(finished.stderr)
    assert found, finished.stderr
    return {"tok_per_s": float(found[2]), "output_tokens": int(found[1]), "client_cpu_s": cpu_s, "wall_s": wall_s}


def vllm_round(args: argparse.Namespace, prompts: Path, folder: Path) -> dict[str, float]:
    finished, cpu_s, wall_s = timed(
        [args.vllm, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
         "--model", "target", "--tokenizer", args.model, "--host", "127.0.0.1", "--port", str(args.port),
         "--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template",
         "--custom-output-len", str(args.max_tokens), "--num-prompts", str(args.num_prompts),
         "--max-concurrency", str(args.concurrency), "--temperature", "0", "--disable-shuffle", "--save-result",
         "--result-dir", str(folder), "--result-filename", "bench.json"]
    )  # fmt: skip
    result = json.loads((folder / "bench.json").read_text())
    return {"tok_per_s": result["output_throughput"], "output_tokens": result["total_output_tokens"],
            "client_cpu_s": cpu_s, "wall_s": wall_s}  # fmt: skip


def timed(command: list[str]) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Run a client; its CPU seconds and wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return finished, round(cpu_s, 2), round(time.monotonic() - began, 2)


def report(args: argparse.Namespace, rounds: list[dict]) -> None:
    ratios = [pair["fledge"]["tok_per_s"] / pair["vllm bench"]["tok_per_s"] for pair in rounds]
    median = {
        name: {key: statistics.median(pair[name][key] for pair in rounds) for key in rounds[0][name]}
        for name in ("fledge", "vllm bench")
    }
    result = {"ratio_median": statistics.median(ratios), "ratios": ratios, "median": median, "rounds": rounds}
    named = {"prompts": args.prompts.name, "out": args.out.name, "model": Path(args.model).name, "vllm": "vllm"}
    facts = provenance.collect({**{key: str(value) for key, value in vars(args).items()}, **named})
    facts["command"] = "python benchmarks/regenerate_throughput.py --model DIR --prompts prompts.jsonl --vllm VLLM"
    provenance.write_json(args.out.with_suffix(".json"), {"what": __doc__.splitlines()[0], **result, **facts})
    lines = [
        f"# {__doc__.splitlines()[0]}", "",
        f"{args.num_prompts} prompts, at most {args.max_tokens} tokens each, greedy, {args.concurrency} in flight, "
        f"{len(rounds)} rounds in turns; {facts['hardware']['cpu']}, {facts['hardware']['cores']} cores. Medians.", "",
        "| client | output tok/s | output tokens | client CPU s, start-up included | wall s |", "|---|---|---|---|---|",
        *(f"| {name} | {m['tok_per_s']:.1f} | {m['output_tokens']:.0f} | {m['client_cpu_s']:.1f} | {m['wall_s']:.1f} |"
          for name, m in median.items()), "",
        f"fledge reaches {statistics.median(ratios):.1%} of `vllm bench serve` "
        f"(rounds: {', '.join(f'{ratio:.1%}' for ratio in ratios)}).",
    ]  # fmt: skip
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
