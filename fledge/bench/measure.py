"""One question through plain and speculative decoding, turn by turn, into one row.

The two sides take turns on every prompt, in alternating order, so that a machine that warms up or slows down does so
for both. Both see the same prompt at every turn: the conversation goes on with the plain side's answer (the only
side's when there is one). Whatever is not decoding (quality checks, coloured samples) happens after both clocks
stopped. Knows a `BenchEngine`, not how it decodes.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

from fledge.bench.prompts import turn_text
from fledge.bench.quality import compare_outputs, score_answer
from fledge.bench.questions import Question
from fledge.bench.rows import Row
from fledge.bench.sandbox import Isolation
from fledge.data.samples import Prompt
from fledge.decoding.records import Generation
from fledge.decoding.requests import PromptTooLong

WARM_UP_TOKENS = 48
SAMPLE_TOKENS = 96


class BenchEngine(Protocol):
    """A target (with or without a head) that can answer, and be asked what it thinks of an answer."""

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt: ...

    def generate(
        self, side: str, prompt: Prompt, *, max_new_tokens: int, seed: int, trace: bool = False
    ) -> Generation: ...

    def text(self, token_ids: list[int]) -> str: ...

    def top2(self, prompt: Prompt, token_ids: list[int], chosen: Sequence[int] = ()) -> dict[str, Any]: ...

    def mean_log_likelihood(self, prompt: Prompt, token_ids: list[int]) -> float: ...

    def eos_token_ids(self) -> tuple[int, ...]: ...

    def coloured_rounds(self, generation: Generation) -> list[dict[str, Any]]: ...

    def peak_memory_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """What `measure` needs of the flags."""

    sides: tuple[str, ...]
    temperature: float
    max_new_tokens: int
    seed: int
    checks: bool = True
    run_code: Isolation | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One question to measure once; `sampled`: also draw its coloured sample."""

    question: Question
    repeat: int
    index: int
    sampled: bool = False

    def key_fields(self) -> dict[str, Any]:
        """What identifies this job's row; an edited question is another question."""
        question = self.question
        sha = hashlib.sha256(json.dumps([question.system, question.turns]).encode()).hexdigest()[:12]
        return {
            "dataset": question.dataset, "question_id": question.id, "question_sha": sha, "repeat": self.repeat,
        }  # fmt: skip


def measure(engine: BenchEngine, job: Job, settings: MeasureSettings) -> Row:
    """Measure one question on every side and return its row; a question too long for the target is `skipped`."""
    try:
        return _measured(engine, job, settings)
    except PromptTooLong as error:
        return {**job.key_fields(), "turns": [], "skipped": str(error)}


def _measured(engine: BenchEngine, job: Job, settings: MeasureSettings) -> Row:
    question = job.question
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    turns: list[dict[str, Any]] = []
    for number, content in enumerate(question.turns):
        messages.append({"role": "user", "content": content})
        prompt = engine.prompt(messages)
        seed = turn_seed(settings.seed, question, job.repeat, number)
        order = settings.sides if (job.index + job.repeat + number) % 2 == 0 else settings.sides[::-1]
        made = {
            side: engine.generate(side, prompt, max_new_tokens=settings.max_new_tokens, seed=seed)
            for side in order
        }  # fmt: skip
        for generation in made.values():
            check_generation(generation, settings.max_new_tokens, engine.eos_token_ids())
        turn: dict[str, Any] = {"prompt_tokens": len(prompt), "order": list(order)}
        turn |= {side: side_record(engine, made[side]) for side in settings.sides}
        if settings.checks:
            outputs = {side: made[side].token_ids for side in settings.sides}
            turn["check"] = compare_outputs(engine, prompt, outputs, greedy=settings.temperature == 0)
        if job.sampled and number == 0 and "eagle" in settings.sides:
            turn["sample"] = coloured_sample(engine, prompt, min(settings.max_new_tokens, SAMPLE_TOKENS), seed)
        turns.append(turn)
        messages.append({"role": "assistant", "content": turn[settings.sides[0]]["text"]})
    row: Row = {
        **job.key_fields(), "category": question.category, "question": turn_text(question.turns[0])[:300],
        "peak_memory_bytes": engine.peak_memory_bytes(), "turns": turns,
    }  # fmt: skip
    if settings.checks:
        row["score"] = {
            side: score_answer(question, turns[0][side]["text"], run_code=settings.run_code) for side in settings.sides
        }
    return row


def warm_up(engine: BenchEngine, questions: Sequence[Question], settings: MeasureSettings) -> None:
    """Run every side once, unmeasured, on the first question that fits: compilation, caches and clocks settle here."""
    num_tokens = min(WARM_UP_TOKENS, settings.max_new_tokens)
    for question in questions:
        prompt = engine.prompt([{"role": "user", "content": question.turns[0]}])
        try:
            for side in settings.sides:
                engine.generate(side, prompt, max_new_tokens=num_tokens, seed=settings.seed)
            return
        except PromptTooLong:
            continue


def check_generation(generation: Generation, max_new_tokens: int, eos_token_ids: tuple[int, ...]) -> None:
    """Refuse a generation whose counts do not add up: every figure of a report rests on them.

    n tokens = 1 of the prefill + for every verification round its accepted drafts and the target's own token. Counted
    by a loop index instead of rounds, or with tokens behind the end, this fails.
    """
    ids, rounds = generation.token_ids, generation.num_forwards
    assert 1 <= len(ids) <= max_new_tokens, f"{len(ids)} tokens emitted, limit {max_new_tokens}"
    assert not set(ids[:-1]) & set(eos_token_ids), "tokens after the end-of-sequence token were counted"
    if generation.accepted:
        assert rounds == len(generation.accepted), f"{rounds} forwards but {len(generation.accepted)} rounds"
        assert len(ids) == 1 + rounds + sum(generation.accepted), (
            f"{len(ids)} tokens are not 1 + {rounds} rounds + {sum(generation.accepted)} accepted drafts"
        )
    else:
        assert rounds == len(ids) - 1, f"{len(ids)} tokens need {len(ids) - 1} plain forwards, found {rounds}"


def side_record(engine: BenchEngine, generation: Generation) -> dict[str, Any]:
    """One side's generation as it stands in a row."""
    return {
        "num_tokens": len(generation.token_ids),
        "num_forwards": generation.num_forwards,
        "ttft_s": generation.ttft_s,
        "decode_s": generation.decode_s,
        "phases_s": dict(generation.phases_s),
        "accepted": list(generation.accepted),
        "drafted_depth": generation.drafted_depth,
        "finish_reason": generation.finish_reason,
        "token_ids": list(generation.token_ids),
        "text": engine.text(generation.token_ids),
    }


def coloured_sample(engine: BenchEngine, prompt: Prompt, max_new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """The first tokens once more with tracing, outside every clock: per round what was accepted, rejected, bonus."""
    traced = engine.generate("eagle", prompt, max_new_tokens=max_new_tokens, seed=seed, trace=True)
    return engine.coloured_rounds(traced)


def turn_seed(seed: int, question: Question, repeat: int, turn: int) -> int:
    """The sampling seed of one turn: the same on both sides, different everywhere else."""
    return zlib.crc32(f"{seed}|{question.dataset}|{question.id}|{repeat}|{turn}".encode())
