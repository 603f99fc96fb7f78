"""`fledge bench --backend server`: the same prompts against servers without and with the head.

A *level* is one set, asked once on one side with so many conversations in flight; it is measured and kept as a whole,
because throughput and the server's metrics belong to all of its requests together. With both servers at hand the sides
alternate level by level; servers started here run one after the other, since they share the machine.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fledge import provenance
from fledge.bench.client import ServerAnswer, ServerRequest, acceptance_of, ask, metrics, metrics_between
from fledge.bench.measure import Job, turn_seed
from fledge.bench.prompts import load_questions
from fledge.bench.questions import Question
from fledge.bench.report import write_report
from fledge.bench.rows import Results, Row, open_results, row_key
from fledge.bench.settings import SIDES, BenchSettings
from fledge.bench.sides import counterparts, record_run
from fledge.bench.stats import by_category, speedup
from fledge.console import progress, say, warn
from fledge.data.image_urls import with_data_urls
from fledge.data.rejects import Reject
from fledge.errors import UserError
from fledge.http_client import Client, Limits, ServerError, base_url
from fledge.redaction import redact
from fledge.servers.replies import served_model

START_PORT = 6100
LIMITS = Limits(total_s=3600.0, connect_s=30.0)
# what is about one question, not about the server: a reply that is none, or a request it refuses (too long, mostly)
OF_ONE_QUESTION = (
    "malformed answer", "stopped answer", "reply too large", "redirect", "connection broke", "time-out",
    "HTTP 400", "HTTP 413", "HTTP 422",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Level:
    """One set, asked once on one side with `concurrency` conversations in flight."""

    dataset: str
    side: str
    concurrency: int
    repeat: int
    questions: tuple[Question, ...]

    def key_fields(self) -> dict[str, Any]:
        """What identifies the level's row; other questions make another level."""
        shas = [Job(question, self.repeat, 0).key_fields()["question_sha"] for question in self.questions]
        sha = hashlib.sha256(json.dumps(shas).encode()).hexdigest()[:12]
        return {
            "dataset": self.dataset, "question_id": f"{len(self.questions)} questions", "question_sha": sha,
            "repeat": self.repeat, "side": self.side, "concurrency": self.concurrency,
        }  # fmt: skip


def bench_servers(args: BenchSettings) -> None:
    """Measure every level that has no row yet, then write the report."""
    if args.model.mode == "aa":
        raise UserError("--mode aa compares plain decoding with itself in this process; servers have no such mode.")
    api_key(args.server.api_key_env)  # before servers are started for minutes
    levels = list_levels(args)
    with open_results(args.output_dir, settings := settings_of(args), overwrite=args.output.overwrite) as results:
        other = record_run(args.output_dir, args, settings, results.fingerprint)
        missing = [level for level in levels if row_key(level.key_fields()) not in results]
        if len(missing) < len(levels):
            say(f"{len(levels) - len(missing)} of {len(levels)} levels are already in {results.path}.")
        with progress("levels", len(levels), done=len(levels) - len(missing)) as bar:
            for group in groups(args, missing):
                with served(args, {level.side for level in group}) as urls:
                    asyncio.run(measure_levels(args, group, urls, results, bar))
        wanted = {row_key(level.key_fields()) for level in levels}
        rows = [row for row in results.rows if row_key(row) in wanted]
        if args.output.no_metrics:
            say(f"{len(levels)} levels are in {results.path} (--no-metrics: no summary, no report).")
            return refuse_failed(rows, results.path)
        rows += (others := counterparts(rows, args.output_dir, other))
        sets = summarise_levels(rows, seed=args.sampling.seed, greedy=args.sampling.temperature == 0)
        write_report(
            args.output_dir, [], model_id=args.model_id, settings=settings, config=args, sets=sets,
            other=other if others else None,
        )  # fmt: skip
        refuse_failed(rows, results.path)


def refuse_failed(rows: Sequence[Row], path: Path) -> None:
    """A UserError that names the questions without an answer; called when everything is written."""
    failed = [(row, question, why) for row in rows for question, why in row.get("failed", {}).items()]
    if failed:
        row, question, why = failed[0]
        raise UserError(
            f"{row['dataset']} question {question} ({row['side']}): {why.rstrip('.')}. In all {len(failed)} questions "
            f"failed and are left out; `failed` in {path} lists them."
        )


def list_levels(args: BenchSettings) -> list[Level]:
    """Sides alternate level by level, in changing order."""
    levels: list[Level] = []
    sides = SIDES[args.model.mode]
    for name in args.prompts.bench_name:
        questions = tuple(
            load_questions(
                name, bench_dir=args.prompts.bench_dir, begin=args.prompts.question_begin, end=args.prompts.question_end
            )
        )
        for concurrency in args.server.concurrency:
            for repeat in range(args.prompts.repeats):
                for side in sides if repeat % 2 == 0 else sides[::-1]:
                    levels.append(Level(questions[0].dataset, side, concurrency, repeat, questions))
    return levels


def groups(args: BenchSettings, levels: list[Level]) -> list[list[Level]]:
    """Levels that run while the same servers are up: all of them, or side by side when we start the servers."""
    if args.server.baseline_url and args.server.eagle_url or len(SIDES[args.model.mode]) == 1:
        return [levels] if levels else []
    by_side = [[level for level in levels if level.side == side] for side in SIDES[args.model.mode]]
    return [group for group in by_side if group]


@contextlib.contextmanager
def served(args: BenchSettings, sides: set[str]) -> Iterator[dict[str, str]]:
    """URLs of the sides' servers; one without a URL is started through `fledge serve`'s engine, and stopped."""
    given = {"baseline": args.server.baseline_url, "eagle": args.server.eagle_url}
    urls = {side: base_url(str(given[side])) for side in sides if given[side]}
    absent = sides - set(urls)
    if not absent:
        yield urls
        return
    (side,) = absent  # servers started here run one at a time: `groups`
    from fledge.export.servable import check_draft
    from fledge.servers.processes import ServerSettings, plan, running, visible_gpus

    if side == "eagle" and args.model.draft:
        check_draft(args.model.draft, args.model.target, args.server.num_speculative_tokens)
    serve = ServerSettings(
        target=args.model.target, num_servers=1,
        tensor_parallel_size=args.workers.num_gpus_per_model, base_port=START_PORT,
        draft=args.model.draft if side == "eagle" else None,
        num_speculative_tokens=args.server.num_speculative_tokens, output_dir=args.output_dir / "servers",
        vllm_args=("--no-enable-prefix-caching",),  # a prompt asked twice must not look faster
    )  # fmt: skip
    servers = plan(serve, visible_gpus(None))
    with running(servers):
        yield {**urls, side: servers[0].url}


async def measure_levels(
    args: BenchSettings, levels: Sequence[Level], urls: dict[str, str], results: Results, bar: Any
) -> None:
    """Run the levels one after the other, each server warmed up once."""
    async with Client(api_key=api_key(args.server.api_key_env), limits=LIMITS) as client:
        requests = {side: request_for(args, await model_of(client, url)) for side, url in urls.items()}
        for side in dict.fromkeys(level.side for level in levels):
            await warm_up(client, urls[side], requests[side])
        for level in levels:
            row = await measure_level(client, urls[level.side], requests[level.side], level, args.sampling.seed)
            results.append(row)
            bar.advance(note=f"{level.dataset} {level.side}, {level.concurrency} in flight")


async def model_of(client: Client, url: str) -> str:
    """The name of the model a server serves."""
    try:
        return await served_model(client, url)
    except ServerError as error:
        raise UserError(
            f"{url}: no OpenAI-compatible server there ({error}). Start one, for instance with `fledge serve`, or "
            f"leave out its URL to have it started."
        ) from None


async def warm_up(client: Client, url: str, request: ServerRequest) -> None:
    """One short question that is not measured."""
    try:
        await ask(client, url, request, [{"role": "user", "content": "Say hello."}], 0)
    except ServerError as error:
        refuse_lasting(url, error)
        warn(f"{url}: the question asked to warm up failed ({error}).")


def refuse_lasting(url: str, error: ServerError) -> None:
    """End the run where every question would fail the same way."""
    if error.kind not in OF_ONE_QUESTION:
        raise UserError(
            f"{url}: no answer ({error}). Is the server running? What is measured is kept; run the same command again."
        ) from None


def api_key(variable: str | None) -> str | None:
    """The API key; it is read from the environment and never written anywhere."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UserError(f"--api-key-env {variable}: that variable is not set. Export the server's API key in it.")
    return os.environ[variable]


def request_for(args: BenchSettings, model: str) -> ServerRequest:
    """The flags as request settings."""
    sampling = args.sampling
    return ServerRequest(
        model, sampling.temperature, sampling.top_p, sampling.extra, sampling.max_new_tokens,
        args.model.enable_thinking,
    )  # fmt: skip


async def measure_level(client: Client, url: str, request: ServerRequest, level: Level, seed: int) -> Row:
    """All questions of a level, `concurrency` conversations at a time; a conversation's turns follow each other.

    A question whose reply is odd is in the row's `failed` with the reason, and in no figure.
    """
    waiting = list(reversed(level.questions))
    done: dict[str, list[ServerAnswer]] = {}
    failed: dict[str, str] = {}

    async def work() -> None:
        while waiting:
            question = waiting.pop()
            try:
                done[question.id] = await converse(client, url, request, question, seed, level.repeat)
            except ServerError as error:
                refuse_lasting(url, error)
                failed[question.id] = redact(str(error))

    before = await metrics(client, url)
    start = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(level.concurrency, len(waiting))):
                group.create_task(work())
    except* UserError as errors:
        raise errors.exceptions[0] from None
    wall_s = time.perf_counter() - start
    if not done:
        raise UserError(f"{url}: every question failed, the first one with: {next(iter(failed.values()))}.")
    change = metrics_between(before, await metrics(client, url))
    answers = {
        question.id: [dataclasses.asdict(answer) for answer in done[question.id]]
        for question in level.questions if question.id in done
    }  # fmt: skip
    categories = {question.id: question.category for question in level.questions}
    return {
        **level.key_fields(), "wall_s": wall_s, "metrics": change, "answers": answers, "categories": categories,
        "failed": failed,
    }  # fmt: skip


async def converse(
    client: Client, url: str, request: ServerRequest, question: Question, seed: int, repeat: int
) -> list[ServerAnswer]:
    """All turns of a question, with the model's own answers in between."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    answers = []
    for number, content in enumerate(question.turns):
        try:
            messages += await asyncio.to_thread(with_data_urls, [{"role": "user", "content": content}])
        except Reject as reject:
            raise UserError(f"{question.dataset} question {question.id}: {reject.detail}") from None
        answer = await ask(client, url, request, messages, turn_seed(seed, question, repeat, number))
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer.text})
    return answers


# -- figures -----------------------------------------------------------------------------------------------------------


def summarise_levels(rows: Sequence[Row], *, seed: int, greedy: bool) -> dict[str, Any]:
    """Figures per set and concurrency, in the shape of `stats.summarise_set`."""
    sets = {}
    for dataset, concurrency in dict.fromkeys((row["dataset"], row["concurrency"]) for row in rows):
        mine = [row for row in rows if (row["dataset"], row["concurrency"]) == (dataset, concurrency)]
        sets[f"{dataset}, {concurrency} in flight"] = level_figures(mine, seed=seed, greedy=greedy)
    return sets


def level_figures(rows: Sequence[Row], *, seed: int, greedy: bool) -> dict[str, Any]:
    """Figures of one set at one concurrency, all sides and repeats."""
    sides = [side for side in ("baseline", "eagle") if any(row["side"] == side for row in rows)]
    figures: dict[str, Any] = {
        "questions": len(rows[0]["answers"]), "repeats": len({row["repeat"] for row in rows}),
        "concurrency": rows[0]["concurrency"],
        **{side: side_figures([row for row in rows if row["side"] == side]) for side in sides},
    }  # fmt: skip
    change: dict[str, float] = {}
    for row in rows:
        for name, value in row["metrics"].items() if row["side"] == "eagle" else ():
            change[name] = change.get(name, 0.0) + value / (1 if name.startswith("vllm") else figures["repeats"])
    accepted = acceptance_of(change)
    if accepted:
        figures["acceptance"] = accepted
    elif "eagle" in sides:
        warn(f"{rows[0]['dataset']}: the server with the head reports no speculative decoding in /metrics: no tau.")
    figures["quality"] = {}
    if len(sides) == 2 and as_local_rows(rows):
        figures["speedup"] = speedup(as_local_rows(rows), seed=seed)
        figures["categories"] = by_category(as_local_rows(rows), seed=seed)
        plain, eagle = (figures[side]["throughput_tokens_per_s"] for side in sides)
        figures["throughput_ratio"] = eagle / plain
        figures["quality"] = compare_texts(rows) if greedy else {}
    return figures


def side_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Speeds and waiting times of one side."""
    answers = [answer for row in rows for answers in row["answers"].values() for answer in answers]
    tokens, seconds = sum(a["num_tokens"] - 1 for a in answers), sum(a["decode_s"] for a in answers)
    per_token = [a["decode_s"] / (a["num_tokens"] - 1) for a in answers if a["num_tokens"] > 1]
    ttft = [a["ttft_s"] for a in answers]
    return {
        "tokens": sum(a["num_tokens"] for a in answers),
        "tokens_per_s": tokens / seconds if seconds else None,  # what one user sees
        "throughput_tokens_per_s": float(np.median([throughput(row) for row in rows])),
        "ttft_s_median": float(np.median(ttft)),
        "ttft_s_p90": float(np.percentile(ttft, 90)),
        "tpot_s_median": float(np.median(per_token)) if per_token else None,
        "tpot_s_p90": float(np.percentile(per_token, 90)) if per_token else None,
        "stopped_at_limit": sum(a["finish_reason"] == "length" for a in answers),
    }  # fmt: skip


def throughput(row: Row) -> float:
    """Tokens per second of all users of a level together."""
    return sum(answer["num_tokens"] for answers in row["answers"].values() for answer in answers) / row["wall_s"]


def as_local_rows(rows: Sequence[Row]) -> list[Row]:
    """The levels as rows of questions, for the shared speed-up figure."""
    by_side = {(row["repeat"], row["side"]): row["answers"] for row in rows}
    made = []
    for repeat in sorted({row["repeat"] for row in rows}):
        plain, eagle = by_side[repeat, "baseline"], by_side[repeat, "eagle"]
        for question, turns in plain.items():
            if question not in eagle:  # failed there
                continue
            pairs = zip(turns, eagle[question], strict=True)
            made.append({
                "dataset": rows[0]["dataset"], "question_id": question, "repeat": repeat,
                "category": rows[0].get("categories", {}).get(question, ""),
                "turns": [{"baseline": one, "eagle": other} for one, other in pairs],
            })  # fmt: skip
    return made


def compare_texts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many answers are equal, turns behind a difference left out. A server cannot be asked for its near-ties."""
    compared = identical = 0
    for row in as_local_rows(rows):
        for turn in row["turns"]:
            compared += 1
            if turn["baseline"]["text"] != turn["eagle"]["text"]:
                break
            identical += 1
    return {"compared": compared, "identical": identical, "unchecked": compared - identical}


def settings_of(args: BenchSettings) -> dict[str, Any]:
    """Everything that may change a measured figure."""
    return {
        "backend": "server", "target": args.model.target, "head": args.model.draft,
        "baseline_url": redact(args.server.baseline_url or "") or None,
        "eagle_url": redact(args.server.eagle_url or "") or None, "mode": args.model.mode,
        "thinking": args.model.thinking,
        "temperature": args.sampling.temperature, "top_p": args.sampling.top_p,
        **{name: value for name, value in args.sampling.extra.given().items() if name != "top_k"},
        "sample_top_k": args.sampling.sample_top_k or 0, "max_new_token": args.sampling.max_new_tokens,
        "seed": args.sampling.seed, "num_speculative_tokens": args.server.num_speculative_tokens,
        "num_gpus_per_model": args.workers.num_gpus_per_model,
        "hardware": provenance.hardware(),
    }  # fmt: skip
