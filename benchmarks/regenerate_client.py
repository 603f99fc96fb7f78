"""What `fledge regenerate` itself costs: CPU at 20,000 tok/s from a fast fake server, memory over a million rows.

    python benchmarks/regenerate_client.py --out benchmarks/regenerate_client_2core-cpu_202611

CPU: a server in another process answers 300 tokens (with their ids, as vLLM sends them) at a fixed total rate, and once
as fast as it can. Memory: rows stream from file to shards through an engine that answers at once; the largest resident
size of the process is read as it goes. Deduplication is on: it is what remembers most.
"""

import argparse
import asyncio
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from fledge import provenance
from fledge.commands import regenerate as command
from fledge.commands.regenerate import RegenerateArgs
from fledge.regeneration.engine import PromptAnswer
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings

REPOSITORY = Path(__file__).resolve().parent.parent
RATE = re.compile(r"(\d+) answer tokens \(([\d.]+) tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    parser.add_argument("--tokens-per-s", type=float, default=20_000)
    parser.add_argument("--answer-tokens", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=40, help="length of the CPU measurement at the fixed rate")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the memory measurement")
    parser.add_argument("--port", type=int, default=8141)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steady_rows = int(args.seconds * args.tokens_per_s / args.answer_tokens)
        steady = cpu(args, Path(folder) / "steady", steady_rows, args.tokens_per_s)
        print(json.dumps(steady), flush=True)
        fastest = cpu(args, Path(folder) / "fastest", steady_rows, 0.0)
        print(json.dumps(fastest), flush=True)
        memory = in_own_process(Path(folder) / "memory", args.rows)
    report(args, steady, fastest, memory)


def cpu(args: argparse.Namespace, folder: Path, rows: int, tokens_per_s: float) -> dict[str, float]:
    """The client as a process of its own, against a server in another."""
    folder.mkdir()
    write_rows(folder / "in.jsonl", rows)
    server = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "fakes" / "openai_server.py"), "--port", str(args.port),
         "--answer-tokens", str(args.answer_tokens), "--tokens-per-s", str(tokens_per_s)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None and server.stdout.readline()
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        client = subprocess.run(
            [sys.executable, "-m", "fledge", "regenerate", "--data", str(folder / "in.jsonl"),
             "--output-dir", str(folder / "out"), "--endpoints", f"127.0.0.1:{args.port}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    finally:
        server.terminate()
        server.wait()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = RATE.search(client.stderr)
    assert found, client.stderr
    return {
        "rows": rows, "output_tokens": int(found[1]), "tok_per_s": float(found[2]), "client_cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2), "client_core_share": round(cpu_s / wall_s, 3),
        "client_peak_rss_mib": round(after.ru_maxrss / 1024),
    }  # fmt: skip


class InstantEngine:
    """Answers at once, 300 tokens with their ids."""

    model, concurrency = "instant", 256

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        return None

    async def answer(self, request):
        await asyncio.sleep(0)
        return PromptAnswer("word " * 300, "stop", 40, 300, prompt_ids=list(range(40)), output_ids=list(range(300)))


def in_own_process(folder: Path, rows: int) -> dict[str, object]:
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r})\n" \
              f"import regenerate_client as b; b.memory(b.Path({str(folder)!r}), {rows})"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout)


def memory(folder: Path, rows: int) -> None:
    """Print the resident size along the way, as JSON."""
    folder.mkdir()
    write_rows(folder / "in.jsonl", rows)
    sizes: list[tuple[float, int]] = []
    began = time.monotonic()

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+)", status)
            assert found
            sizes.append((round(time.monotonic() - began, 1), int(found[1]) // 1024))
            time.sleep(5)

    threading.Thread(target=watch, daemon=True).start()
    command._engine = lambda args: InstantEngine()  # type: ignore[assignment]
    command.regenerate(
        RegenerateArgs(
            prompts=PromptSourceSettings(data=str(folder / "in.jsonl"), deduplicate=True),
            output_dir=folder / "out", answers=AnswerSettings(), engines=EngineSettings(),
        )
    )  # fmt: skip
    lines = sum(1 for path in (folder / "out").glob("shard-*.jsonl") for _ in open(path, "rb"))
    written = sum(path.stat().st_size for path in (folder / "out").glob("shard-*.jsonl"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({
        "rows": rows, "rows_in_shards": lines, "written_gib": round(written / 2**30, 2), "peak_rss_mib": peak,
        "wall_s": round(time.monotonic() - began), "rss_mib_by_second": sizes[:: max(len(sizes) // 20, 1)],
    }))  # fmt: skip


def write_rows(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as out:
        for index in range(rows):
            question = (
                f"Question number {index}: what follows from the fact that {index * 7919 % 104729} is what it is?"
            )
            out.write(
                json.dumps({"id": f"row-{index}", "conversations": [{"from": "human", "value": question}]}) + "\n"
            )


def report(args: argparse.Namespace, steady: dict, fastest: dict, memory: dict) -> None:
    facts = provenance.collect({key: str(value) for key, value in vars(args).items()})
    document = {"what": __doc__.splitlines()[0], "steady": steady, "fastest": fastest, "memory": memory, **facts}
    provenance.write_json(args.out.with_suffix(".json"), document)
    hardware = facts["hardware"]
    lines = [
        f"# {__doc__.splitlines()[0]}", "",
        f"{hardware['cpu']}, {hardware['cores']} cores, other work running beside it. Answers of {args.answer_tokens} "
        "tokens with their ids.", "",
        "| server | tok/s | rows/s | client CPU s | wall s | share of one core | peak RSS MiB |",
        "|---|---|---|---|---|---|---|",
        *(f"| {name} | {m['tok_per_s']:.0f} | {m['rows'] / m['wall_s']:.0f} | {m['client_cpu_s']} | {m['wall_s']} | "
          f"{m['client_core_share']:.0%} | {m['client_peak_rss_mib']} |"
          for name, m in ((f"{args.tokens_per_s:.0f} tok/s", steady), ("as fast as it can", fastest))), "",
        f"Memory: {memory['rows']:,} rows ({memory['written_gib']} GiB written, {memory['rows_in_shards']:,} in "
        f"shards), peak resident size {memory['peak_rss_mib']} MiB, {memory['wall_s']} s, through an engine that "
        "answers at once.",
    ]  # fmt: skip
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
