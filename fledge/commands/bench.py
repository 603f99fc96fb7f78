"""`fledge bench`: plain against speculative decoding on the same prompts. The story of a run is `fledge.bench.run`."""

from fledge.bench.settings import BenchSettings as BenchArgs

__all__ = ["MAIN", "BenchArgs", "bench"]

MAIN = (
    "target", "draft", "bench_name", "question_begin", "question_end", "output_dir", "overwrite", "temperature",
    "max_new_tokens", "seed", "total_token", "depth", "top_k", "tune", "mode", "dtype", "num_gpus_per_model",
    "num_gpus_total", "backend", "baseline_url", "eagle_url", "concurrency",
)  # fmt: skip


def bench(args: BenchArgs) -> None:
    """Measure plain against speculative decoding on the same prompts and write a report.

    Results go to --output-dir: results.jsonl, summary.json, report.md, report.html. Interrupted runs continue.
    """
    from fledge.bench import run

    run.bench(args)
