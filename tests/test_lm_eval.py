"""The lines of docs/python.md that give a pair to lm-evaluation-harness; run where `lm_eval` is installed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT
from tiny import tiny_draft

import fledge
from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.target.model import Target

lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = [f"Say {number} words" for number in range(6)]
GENERATION = {"until": ["e"], "max_gen_toks": 24, "do_sample": False}


@pytest.fixture
def pair(tiny_model_dir, tmp_path) -> Any:
    save_draft(tiny_draft(Target.from_pretrained(str(tiny_model_dir)), draft_vocab_size=None), tmp_path / "head")
    return fledge.load(str(tiny_model_dir), str(tmp_path / "head"))


def documented() -> dict[str, Any]:
    """What the lines of the page define."""
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {"fledge": fledge}
    exec(compile(block, "docs/python.md", "exec"), names)
    return names


def task_folder(folder: Path, answers: list[str]) -> Path:
    """A task of the harness's own kind, from a local file."""
    folder.mkdir()
    rows = [{"question": one, "answer": answer} for one, answer in zip(QUESTIONS, answers, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "say", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": GENERATION, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (folder / "say.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_the_harness_scores_a_pair_as_it_scores_the_target(pair, tmp_path, monkeypatch):
    """Answers, score and likelihood are those of the harness's own model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    drafted = documented()["Drafted"](pair)
    right = [drafted.answer(question, GENERATION) for question in QUESTIONS]
    gold = [*right[:3], *(f"not {text}" for text in right[3:])]
    manager = TaskManager(include_path=str(task_folder(tmp_path / "tasks", gold)), include_defaults=False)
    plain = HFLM(pretrained=pair.target.model, tokenizer=pair.tokenizer)
    found = [
        lm_eval.simple_evaluate(model, tasks=["say"], task_manager=manager, log_samples=True, bootstrap_iters=0)
        for model in (drafted, plain)
    ]
    answers, of_target = ([sample["resps"] for sample in one["samples"]["say"]] for one in found)
    assert answers == of_target and any(answer[0][0] for answer in answers)
    assert [one["results"]["say"]["exact_match,none"] for one in found] == [0.5, 0.5]
    request = lm_eval.api.instance.Instance("loglikelihood", {}, ("Say", " words"), 0)
    assert drafted.loglikelihood([request]) == plain.loglikelihood([request])
