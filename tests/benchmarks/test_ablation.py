"""The ablation's common recipe is what it says; the whole script runs on a tiny store."""

import json
import sys

import pytest
import torch
from benchmark_scripts import load_script
from saved_target import save_target, write_conversations

from fledge.drafters.batch import pack
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.target.record import TargetRecord
from fledge.train import module
from fledge.train.trainer import DraftTrainer


@pytest.fixture(scope="module")
def ablation():
    return load_script("ablation")


def record(mask: str) -> TargetRecord:
    length = len(mask)
    return TargetRecord(
        sample_id=mask, input_ids=torch.arange(length), loss_mask=torch.tensor([c == "a" for c in mask]),
        position_ids=torch.arange(length), tap_hidden=torch.zeros(length, 3, 2), last_hidden=torch.zeros(length, 2),
    )  # fmt: skip


def test_unshifted_rows_are_those_of_the_mask(ablation):
    """Row t at step k is trained iff l_{t+k} (and the teacher's row lies in the document), in each document alone."""
    batch = pack([record("pppaaapp"), record("paapppaaap")])
    found = ablation.unshifted_align(batch, 2)
    first = 0
    for length in batch.lengths:
        mask = batch.loss_mask[first : first + length].tolist()
        for step in range(2):
            rows = found.rows[found.row_index[step][found.trained[step]]].tolist()
            mine = [row - first for row in rows if first <= row < first + length]
            wanted = [t for t in range(length) if t + step < length and mask[t + step] and t + 1 + step < length - 1]
            assert mine == wanted, (length, step)
        first += length
    ours = module.align(batch, 2)
    assert 2 in ours.rows[ours.row_index[0]].tolist()  # the row that predicts the first drafted token
    assert 2 not in found.rows[found.row_index[0]].tolist()


def test_a_tiny_ablation_runs_and_leaves_everything_as_it_was(ablation, tmp_path, monkeypatch):
    save_target(tmp_path / "target")
    write_conversations(tmp_path / "data.jsonl", 12, seed=1)
    extract(ExtractSettings(target=str(tmp_path / "target"), data=[str(tmp_path / "data.jsonl")],
                        output_dir=tmp_path / "states"))  # fmt: skip
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["the quick brown fox"]}) + "\n")
    before = (module.align, DraftTrainer._get_num_items_in_batch)
    words = ["ablation", "--model", tmp_path / "target", "--states", tmp_path / "states", "--steps", 2, "--seeds", 0,
             "--draft-vocab-size", 64, "--ttt-steps", 2, "--tasks", questions, "--max-new-tokens", 8,
             "--recipes", "ours", "common", "--out", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    ablation.main()
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())["results"]
    assert results["ours"]["0"]["questions"] >= 1 and set(results) == {"ours", "common"}
    assert (module.align, DraftTrainer._get_num_items_in_batch) == before
    heads = [torch.load(tmp_path / "out" / f"{name}-0" / "checkpoint-2" / "optimizer.pt") for name in results]
    moments = [next(one["exp_avg"] for one in head["state"].values() if "exp_avg" in one) for head in heads]
    assert moments[0].shape != moments[1].shape  # of ours, AdamW has no matrix but lm_head; of the common recipe, all

    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/*")}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--temperature", "1"])
    ablation.main()
    sampled = json.loads((tmp_path / "out" / "ablation-t1.json").read_text())["results"]
    assert set(sampled["ours"]["0"]) == {"questions", "mean"}
    assert (tmp_path / "out" / "answers-questions-10-8-t1.json").read_text() != (
        tmp_path / "out" / "answers-questions-10-8.json"
    ).read_text()
    assert {file: file.stat().st_mtime_ns for file in trained} == trained  # heads are judged, not trained again
