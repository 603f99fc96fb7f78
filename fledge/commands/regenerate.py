"""`fledge regenerate`: every conversation answered again, by the target itself.

The head learns the text its target writes, so the target writes the training data: the largest single lever on
acceptance. Knows conversations, turns and settings. Does not know how an answer comes about (`engine.py`) nor how rows
survive a crash (`journal.py`).

Every user turn is asked in order, with the target's own previous answers before it. An answer that `--max-new-tokens`
cut, or a turn beyond the context, ends its conversation there; the row says so (`turns_left_out`) and the manifest
counts it. What is drawn per row (seed, temperature, thinking) is a function of `--seed` and the row's id, so a resumed
run draws the same.
"""

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from fledge import provenance
from fledge.console import ProgressBar, progress, say, warn
from fledge.data.conversations import ANSWER_MARK, Conversation, read_conversations
from fledge.data.image_urls import allow_image_urls
from fledge.data.rejects import Reject, Rejects
from fledge.data.rows import is_local
from fledge.data.sampling import ExtraSampling, TemperatureMixture, describe, read_generation_config, resolve_extra
from fledge.data.sealed import verify_sealed
from fledge.errors import UserError
from fledge.http_client import base_url
from fledge.outputs import OutputSettings, check, is_own
from fledge.parsing import read_json
from fledge.ranges import Count
from fledge.regeneration.engine import Engine
from fledge.regeneration.journal import ANSWERS, Journal
from fledge.regeneration.own_prompts import SHORT, UNENDED, PromptWriter
from fledge.regeneration.questions import prompt_digest
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings
from fledge.regeneration.turns import Asker, tally

BATCH_READ = 64
SYNC_EVERY_S = 2.0
CHOSEN = ("duplicate prompt", "prompt too long", "answer cut", UNENDED, SHORT)  # rejects the user asked for
OF_OWN_PROMPTS = ("own_prompts", "target", "system", "max_reject_share")  # what a run that writes prompts reads ...
NOT_OF_THEM = ("thinking", "truncated")  # ... and what of the answers' settings it does not
LASTING = (*CHOSEN, "context length", "broken image", "tool calls", "no question", "unknown part")


MAIN = (
    "data", "own_prompts", "output_dir", "overwrite", "engine", "target", "model", "server", "temperature", "top_p",
    "max_new_tokens", "seed", "thinking", "system", "samples_per_prompt", "deduplicate", "max_samples", "data_format",
    "split", "chat_template_type", "dtype", "num_threads", "retry_rejects",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RegenerateArgs(OutputSettings):
    """The rows."""

    prompts: PromptSourceSettings
    data_shard_size: Count = 50_000
    """Input rows per shard; row i is in shard i // size."""
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    engines: EngineSettings = field(default_factory=EngineSettings)


def regenerate(args: RegenerateArgs) -> None:
    """Let the target answer every conversation again; exact under kills, one row per input row."""
    started = time.monotonic()
    asyncio.run(_regenerate(args))
    say(f"done in {time.monotonic() - started:.0f} s: {args.output_dir}")


async def _regenerate(args: RegenerateArgs) -> None:
    allow_image_urls(args.prompts.allow_image_urls)
    check(args.output_dir, ANSWERS, overwrite=args.overwrite)
    _check_source(args.prompts, args.answers)
    _check_answers(args.answers, args.prompts.samples_per_prompt)
    for server in args.engines.server:
        base_url(server)
    input_rejects = Rejects(max_share=args.prompts.max_reject_share)
    total, digest = _count(args.prompts, input_rejects)
    if _all_there(args, total, digest):
        return
    async with _engine(args) as engine:
        asked = read_generation_config(args.prompts.target or engine.model)
        if args.engines.engine == "transformers":
            asked = asked or {}  # without one, nothing is asked for; a server's model may have one elsewhere
        extra = resolve_extra(_flags(args.answers), asked or {})
        for sentence in describe(extra, asked, temperature=args.answers.temperature, top_p=args.answers.top_p):
            say(sentence)
        with _journal(args, total, _settings(args, engine.model, digest, asked)) as journal:
            provenance.write(args.output_dir / "run.json", asdict(args))
            asks = PromptWriter if args.prompts.own_prompts else Asker
            asker = asks(args.prompts, args.answers, engine, extra)
            run = _Run(args, engine, asker, journal, Rejects(journal.input_rejects, args.prompts.max_reject_share))
            await run.all_rows()
            _report(journal, args, run.rate())


def _check_source(prompts: PromptSourceSettings, answers: AnswerSettings) -> None:
    if (prompts.data is None) == (prompts.own_prompts is None):
        raise UserError(
            "give one of --data (conversations to answer) and --own-prompts N (the target writes so many prompts)."
        )
    if not prompts.own_prompts:
        return
    unread = [name for name in _changed(prompts) if name not in OF_OWN_PROMPTS]
    unread += [name for name in _changed(answers) if name in NOT_OF_THEM]
    if unread:
        others = [f"--{name.replace('_', '-')}" for name in unread]
        raise UserError(
            f"{', '.join(others)}: for the run that answers (--data), not for --own-prompts, which writes the prompts."
        )


def _changed(settings: Any) -> list[str]:
    """The fields that are not at their defaults."""
    return [one.name for one in fields(settings) if getattr(settings, one.name) != one.default]


def _check_answers(answers: AnswerSettings, samples: int) -> None:
    mixture = TemperatureMixture.parse(answers.temperature)
    if samples > 1 and not any(mixture.temperatures):
        raise UserError(
            f"--samples-per-prompt is {samples} at --temperature {answers.temperature}: several answers at temperature "
            "0 would all be the same one. Raise the temperature."
        )


def _flags(answers: AnswerSettings) -> ExtraSampling:
    return ExtraSampling(answers.repetition_penalty, answers.sample_top_k, answers.min_p, answers.stop)


def _journal(args: RegenerateArgs, total: int, settings: dict[str, Any]) -> Journal:
    return Journal(
        args.output_dir, total=total, shard_size=args.data_shard_size, settings=settings, tally=tally,
        overwrite=args.overwrite,
    )  # fmt: skip


def _all_there(args: RegenerateArgs, total: int, digest: str) -> bool:
    """Whether an earlier run of the same settings answered every row: then nobody is asked anything."""
    path = args.output_dir / "manifest.json"
    if not path.is_file() or not is_own(args.output_dir, ANSWERS):
        return False
    before = read_json(path, _Manifest, hint="Choose another --output-dir.").settings
    settings = _settings(args, _model(args) or before.get("model", ""), digest, before.get("generation_config"))
    with _journal(args, total, settings) as journal:
        if args.engines.retry_rejects:
            say(f"{journal.reopen(lambda reason: reason not in LASTING)} rejected rows are asked again")
        if journal.complete:
            say(f"all {journal.total} rows are there already; nothing is asked")
            _report(journal, args)
        return journal.complete


class _Manifest(msgspec.Struct):
    settings: dict[str, Any]


def _count(prompts: PromptSourceSettings, rejects: Rejects) -> tuple[int, str]:
    """How many rows there will be, and a digest of what they ask: reads everything once, before hours of work."""
    digest, total = hashlib.sha256(), 0
    if prompts.data and is_local(prompts.data):
        verify_sealed(Path(prompts.data).expanduser())
    for conversation in _read(prompts, rejects):
        total += prompts.samples_per_prompt
        digest.update(f"{conversation.id}\0{prompt_digest(conversation).hex()}\n".encode())
    return total, digest.hexdigest()[:16]


def _read(prompts: PromptSourceSettings, rejects: Rejects) -> Iterator[Conversation]:
    if prompts.own_prompts:
        yield from (Conversation(f"own-{number}", ()) for number in range(prompts.own_prompts))
        return
    assert prompts.data is not None, "_check_source"
    stream = read_conversations(
        prompts.data, data_format=prompts.data_format, rejects=rejects, split=prompts.split,
        columns=prompts.columns, repeated_ids=prompts.repeated_ids,
    )  # fmt: skip
    for number, conversation in enumerate(stream):
        if prompts.max_samples is not None and number >= prompts.max_samples:
            return
        yield conversation


def _settings(
    args: RegenerateArgs, model: str, digest: str, generation_config: dict[str, Any] | None
) -> dict[str, Any]:
    """What decides the content of the rows: a run is only continued with the same."""
    prompts = asdict(args.prompts)
    names = ("data_format", "system", "deduplicate", "max_prompt_length")
    return {
        **{name: prompts[name] for name in names}, "tokenizer": _tokenizer(args),
        "input_sha256": digest, **asdict(args.answers), "model": model, "engine": args.engines.engine,
        **({"chat_template_type": template} if (template := args.engines.chat_template_type) else {}),
        **({"own_prompts": number} if (number := args.prompts.own_prompts) else {}),
        **({"samples_per_prompt": samples} if (samples := args.prompts.samples_per_prompt) > 1 else {}),
        **({"generation_config": generation_config} if generation_config else {}),
    }  # fmt: skip


def _model(args: RegenerateArgs) -> str | None:
    """The target as the engine knows it; in process that is its folder or hub name, under either flag."""
    here = args.engines.engine == "transformers"
    return args.engines.model or (args.prompts.target if here else None)


def _tokenizer(args: RegenerateArgs) -> str | None:
    """Where the tokenizer comes from, if not from the model itself."""
    return args.prompts.target if args.prompts.target != _model(args) else None


def _engine(args: RegenerateArgs) -> Engine:
    engines = args.engines
    if engines.engine == "transformers":
        if not (model := _model(args)):
            raise UserError("--engine transformers needs --target: the target's folder or hub name.")
        from fledge.regeneration.local_engine import LocalEngine

        return LocalEngine(
            model, dtype=engines.dtype, device=engines.device, batch_size=engines.batch_size,
            chat_template_type=engines.chat_template_type,
        )  # fmt: skip
    if engines.chat_template_type:
        raise UserError(
            f"--chat-template-type {engines.chat_template_type} is for --engine transformers: a server renders with "
            f"its own template. Give it to the server (vLLM: --chat-template FILE), or leave it out."
        )
    from fledge.regeneration.openai_client import OpenAIClient, Patience

    urls = engines.server or tuple(f"127.0.0.1:{engines.base_port + i}" for i in range(engines.max_clients))
    patience = Patience(request_s=engines.request_timeout_s, max_attempts=engines.max_attempts)
    return OpenAIClient(
        urls, concurrency=engines.concurrency, num_in_flight=engines.num_threads, model=engines.model,
        api_key=_api_key(engines.api_key_env), patience=patience, only_answering=not engines.server,
    )  # fmt: skip


def _api_key(variable: str | None) -> str | None:
    if variable and not os.environ.get(variable):
        raise UserError(
            f"--api-key-env {variable}: this environment variable is not set. Export the key under that name."
        )
    return os.environ[variable] if variable else None


Item = tuple[int, Conversation, int | None]  # row number, its conversation, the earlier one that asks the same


class _Run:
    """One pass over the input: reads ahead a little, keeps the engine full, writes rows as they come."""

    def __init__(
        self, args: RegenerateArgs, engine: Engine, asker: Asker | PromptWriter, journal: Journal, rejects: Rejects
    ) -> None:
        self.args, self.engine, self.asker, self.journal, self.rejects = args, engine, asker, journal, rejects
        self.output_tokens, self.started = 0, time.monotonic()
        self._rows = self._missing_rows()
        self._buffer: list[Item] = []
        self._reading = asyncio.Lock()

    async def all_rows(self) -> None:
        done = self.journal.num_done
        if done:
            say(f"{done} of {self.journal.total} rows are there already")
        missing = self.journal.total - done
        with progress("regenerate", self.journal.total, done, min(self.engine.concurrency, missing // 4)) as bar:
            syncing = asyncio.create_task(self._sync_forever())
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.engine.concurrency, max(missing, 1))):
                        workers.create_task(self._worker(bar))
            except ExceptionGroup as errors:  # one reason is enough: the others follow from it
                raise errors.exceptions[0] from None
            finally:
                syncing.cancel()
                self.rejects.close()

    async def _worker(self, bar: ProgressBar) -> None:
        while (item := await self._next()) is not None:
            index, conversation, first = item
            try:
                if first is not None:
                    raise Reject("duplicate prompt", f"asks the same as conversation {first}")
                row = await self.asker.row(conversation)
                self.journal.add(index, row)
                self.output_tokens += row["num_output_tokens"]
            except Reject as reject:
                self.journal.reject(index, conversation.id, reject.reason, reject.detail, conversation.where)
            bar.advance(1, self._note())

    async def _next(self) -> Item | None:
        """The next row to answer. Reading happens in a thread: answers must not wait for a slow disk or hub."""
        async with self._reading:
            if not self._buffer:
                self._buffer = (await asyncio.to_thread(self._read_some))[::-1]
            return self._buffer.pop() if self._buffer else None

    def _read_some(self) -> list[Item]:
        return [item for _, item in zip(range(BATCH_READ), self._rows, strict=False)]

    def _missing_rows(self) -> Iterator[Item]:
        """Rows not done yet; what is a duplicate is settled here, in input order, so that the first one stays."""
        first_asked: dict[bytes, int] = {}
        samples = self.args.prompts.samples_per_prompt
        for number, conversation in enumerate(_read(self.args.prompts, self.rejects)):
            first = number
            if self.args.prompts.deduplicate:
                first = first_asked.setdefault(prompt_digest(conversation)[:10], number)
            for sample in range(samples):
                index = number * samples + sample
                if not self.journal.is_done(index):
                    id = conversation.id if samples == 1 else f"{conversation.id}{ANSWER_MARK}{sample + 1}"
                    yield index, replace(conversation, id=id), first if first != number else None

    async def _sync_forever(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            await asyncio.to_thread(self.journal.sync)

    def rate(self) -> float:
        """Answer tokens per second of this session."""
        return self.output_tokens / max(time.monotonic() - self.started, 1e-3)

    def _note(self) -> str:
        errors = ", ".join(f"{count} {kind}" for kind, count in self.engine.errors.most_common(4))
        return f"{self.rate():.0f} tok/s" + (f" (retried: {errors})" if errors else "")


def _report(journal: Journal, args: RegenerateArgs, rate: float | None = None) -> None:
    """Totals, and a UserError when too much went wrong."""
    counts = journal.counts()
    rejected = Counter({k.removeprefix("rejected: "): n for k, n in counts.items() if k.startswith("rejected: ")})
    speed = "" if rate is None else f" ({rate:.1f} tok/s in this session)"
    say(
        f"{counts['rows']} rows, {counts['output_tokens']} answer tokens{speed}, "
        f"{counts['finish_reason: length']} cut at --max-new-tokens, {rejected.total()} rejected"
    )
    for name, count in sorted(counts.items()):
        if name.startswith("untraced: "):
            warn(f"{count} rows have {name.removeprefix('untraced: ')}, which the chat template does not render")
    for reason, count in rejected.most_common():
        warn(f"{count} rows rejected: {reason} (listed in {args.output_dir / 'rejects.jsonl'})")
    failed = sum(count for reason, count in rejected.items() if reason not in CHOSEN)
    if failed > args.prompts.max_reject_share * journal.total:
        raise UserError(
            f"{failed} of {journal.total} rows have no answer, more than the {args.prompts.max_reject_share:.0%} "
            f"allowed. See {args.output_dir / 'rejects.jsonl'}; --retry-rejects asks them again, --max-reject-share "
            "allows more."
        )
    if counts["rows"] == 0:
        raise UserError(f"no row was answered; see {args.output_dir / 'rejects.jsonl'}.")
