"""Extraction against the bare forward, the loader against the training step, and memory of offline training.

    python benchmarks/extract_cpu.py --model SMOLLM2_DIR --data answers.jsonl --out benchmarks/extract_2core-cpu_202611

Speeds are medians over interleaved rounds, so a busy machine slows both sides alike. Memory is the peak of separate
processes. The large store is the small one listed many times over (hard links): what is measured is the process, and
the process cannot tell.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fledge import provenance
from fledge.extraction.extract import Samples, fill, open_target
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.manifest import MANIFEST, Manifest, read_manifest
from fledge.storage.states.reader import HiddenStore
from fledge.train.records import Part, Records

STEPS = 3
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-gb", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    config = {**vars(args), **{name: Path(getattr(args, name)).name for name in ("model", "data", "out")}}
    command = f"python benchmarks/extract_cpu.py --samples {args.samples} --rounds {args.rounds}"
    provenance.write(args.out.with_suffix(".json"), config, command=command, results=result)
    args.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


def measure(args: argparse.Namespace, work: Path) -> dict[str, float]:
    flags = ExtractSettings(
        target=args.model, data=[args.data], output_dir=work / "store", model_max_length=LENGTH,
        max_samples=args.samples,
    )  # fmt: skip
    opened = open_target(flags)
    samples = Samples.read(flags, opened.template)
    target = opened.producer.target  # type: ignore[attr-defined]
    tokens = sum(len(sample.input_ids) for sample in samples)

    def bare() -> None:
        for sample in samples:
            target.forward(sample.input_ids[None], taps=False)

    def extraction(into: Path) -> None:
        fill(into, opened.identity, opened.head, opened.producer, samples, shard_bytes=256 << 20)

    bare()
    pairs = [(seconds(bare), seconds(lambda: extraction(work / f"round-{r}"))) for r in range(args.rounds)]  # noqa: B023
    result = {
        "tokens": tokens,
        "bare_forward_tok_s": tokens / statistics.median(b for b, _ in pairs),
        "extraction_tok_s": tokens / statistics.median(e for _, e in pairs),
        "extraction_share_of_bare": statistics.median(b / e for b, e in pairs),
    }
    result |= batching(target, next(iter(samples)).input_ids[:128], args.rounds)
    store = work / "round-0"
    result |= loader(store, args.rounds)
    large = enlarge(store, work / "large", args.large_gb * 2**30)
    for name, path in (("small_store", store), ("large_store", large)):
        result[f"{name}_gib"] = sum(s.bytes for s in read_manifest(path).shards) / 2**30
        result |= named(name, train(["--states", str(path)], work / name))
    online = ["--target", args.model, "--data", args.data]
    result |= named("online", train([*online, "--max_samples", str(args.samples)], work / "online"))
    result["loader_times_training"] = result["loader_tok_s"] / result["small_store_train_tok_s"]
    return result


def named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{key}": value for key, value in values.items()}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def batching(target, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Four samples of one length in one pass against four passes: what one by one costs, and what it avoids."""
    four = torch.stack([ids.roll(shift) for shift in range(4)])
    together = target.forward(four).last_hidden
    apart = torch.cat([target.forward(row[None]).last_hidden for row in four])
    pairs = [
        (seconds(lambda: target.forward(four)), seconds(lambda: [target.forward(row[None]) for row in four]))
        for _ in range(rounds)
    ]
    return {
        "one_by_one_time_over_batch_of_4": statistics.median(a / t for t, a in pairs),
        "batched_values_that_differ": (together != apart).float().mean().item(),
    }


def loader(folder: Path, rounds: int) -> dict[str, float]:
    """Tokens per second of a loader with one worker, without training."""
    records = Records([Part.whole(HiddenStore(folder))] * 8)
    tokens = 8 * sum(len(record) for record in HiddenStore(folder))

    def read() -> None:
        for _ in torch.utils.data.DataLoader(records, batch_size=4, shuffle=True, num_workers=1, collate_fn=list):
            pass

    return {"loader_tok_s": tokens / statistics.median(seconds(read) for _ in range(rounds))}


def enlarge(store: Path, into: Path, size: float) -> Path:
    """A store that lists the same shards until it is `size` bytes large."""
    into.mkdir()
    manifest = read_manifest(store)
    shards = []
    while sum(shard.bytes for shard in shards) < size:
        for entry in manifest.shards:
            name = f"shard-{len(shards):05d}.safetensors"
            os.link(store / entry.file, into / name)
            shards.append(dataclasses.replace(entry, file=name))
    os.link(store / "target_head.safetensors", into / "target_head.safetensors")
    records = sum(shard.records for shard in shards)
    large: Manifest = dataclasses.replace(manifest, shards=tuple(shards), planned_records=records)
    (into / MANIFEST).write_text(json.dumps(large.document()))
    return into


def train(source: list[str], output: Path) -> dict[str, float]:
    """A few steps in a process of its own: its tokens per second and peak memory."""
    code = (
        "import json, resource, sys\n"
        "from fledge.cli import run_command\n"
        "assert run_command('train', sys.argv[1:]) == 0\n"
        "print(json.dumps({'peak_rss_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))\n"
    )
    flags = [
        *source, "--output-dir", str(output), "--max_steps", str(STEPS), "--per_device_train_batch_size", "2",
        "--model_max_length", str(LENGTH), "--draft_vocab_size", "8192", "--logging_steps", "1",
        "--disable_tqdm", "True", "--save_strategy", "no",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    speeds = [entry["tokens_per_s"] for entry in history if "tokens_per_s" in entry]
    return {"train_tok_s": statistics.median(speeds), **json.loads(done.stdout.splitlines()[-1])}


def table(result: dict[str, float]) -> str:
    rows = [f"| {key.replace('_', ' ')} | {value:,.3f} |" for key, value in result.items()]
    return "\n".join(["# Extraction and offline training on CPU", "", "| | |", "|---|---:|", *rows, ""])


if __name__ == "__main__":
    main()
