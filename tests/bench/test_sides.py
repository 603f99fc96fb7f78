"""`--mode eagle` and `--mode baseline` into one folder are one report, if nothing but the head lies between them."""

import json
from pathlib import Path

import pytest

from fledge.bench.compare import show_report
from fledge.bench.sides import IN_TURN, RUN
from fledge.errors import UserError


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("modes", [("eagle", "baseline"), ("baseline", "eagle"), ("eagle", "baseline", "eagle")])
def test_two_runs_into_one_folder_are_put_together(make_args, fake_run, modes, capsys):
    """The second run set the first one's rows aside, and no report ever had both sides."""
    for mode in modes:
        tree = {"tree": {"depth": 7}, "head": "head"} if mode == "eagle" else {}
        folder = fake_run(make_args(mode=mode, question_end=12), settings={"mode": mode, "seed": 1, **tree})
    document = summary(folder)
    figures = document["sets"]["quick"]
    assert figures["speedup"]["value"] > 1 and figures["acceptance"]["tau"] > 1
    assert figures["quality"]["identical"] == figures["quality"]["compared"] > 12
    assert document["settings"]["mode"] == IN_TURN and document["settings"]["tree"] == {"depth": 7}
    assert "times as fast" in document["verdict"] and "are identical" in document["verdict"]
    page = (folder / "report.html").read_text()
    assert "in two runs, one after the other" in page and "What drafting looks like" in page
    assert f"put together with the rows of --mode {modes[-2]}" in " ".join(capsys.readouterr().err.split())


def test_the_report_of_two_runs_can_be_drawn_again(make_args, fake_run):
    for mode in ("eagle", "baseline"):
        folder = fake_run(make_args(mode=mode, question_end=3))
    before = (folder / "report.html").read_text()
    show_report(folder, overwrite=False)
    assert (folder / "report.html").read_text() == before


def test_sampled_answers_are_compared_by_likelihood(make_args, fake_run):
    for mode in ("eagle", "baseline"):
        folder = fake_run(make_args(mode=mode, question_end=12, temperature=0.7))
    assert summary(folder)["sets"]["quick"]["quality"]["log_likelihood_difference"]["value"] == 0


@pytest.mark.parametrize("modes", [("eagle", "baseline"), ("baseline", "eagle")])
def test_answers_that_differ_are_held_against_the_targets_scores(make_args, fake_run, fake_engine, modes, monkeypatch):
    """As in a run of both sides: at a near-tie the difference is rounding, elsewhere an error that fails the run."""
    engines = {mode: fake_engine(mode=mode, disagree=mode == "eagle") for mode in modes}
    fake_run(make_args(mode=modes[0], question_end=3), engines[modes[0]])
    with pytest.raises(UserError, match="differ from plain decoding"):
        fake_run(make_args(mode=modes[1], question_end=3), engines[modes[1]])
    monkeypatch.setattr(fake_engine, "top2", lambda *_: {"gap": 0.0001, "behind": 0.0001, "noise": 0.001})
    folder = fake_run(make_args(mode=modes[1], question_end=3), engines[modes[1]])
    quality = summary(folder)["sets"]["quick"]["quality"]
    assert (quality["identical"], quality["ties"], quality["unexplained"]) == (0, 3, 0)
    assert quality["compared"] == 3, "the second turns follow other answers"


@pytest.mark.parametrize(("flags", "reason"), [
    ({"temperature": 0.7}, "differs in temperature"), ({"seed": 7}, "differs in seed"),
    ({"question_end": 5}, "lacks 2 of these 5 rows"),
])  # fmt: skip
def test_runs_that_do_not_fit_stay_apart(make_args, fake_run, flags, reason, capsys):
    fake_run(make_args(mode="eagle", question_end=3))
    folder = fake_run(make_args(mode="baseline", **{"question_end": 3, **flags}))
    assert "speedup" not in summary(folder)["sets"]["quick"]
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 3, "fingerprint": "x"}'])
def test_a_damaged_record_of_the_last_run_joins_nothing(make_args, fake_run, content):
    folder = fake_run(make_args(mode="eagle", question_end=3))
    (folder / RUN).write_text(content)
    fake_run(make_args(mode="baseline", question_end=3))
    assert "speedup" not in summary(folder)["sets"]["quick"]


def test_a_run_of_both_sides_is_not_mixed_with_rows_of_one(make_args, fake_run):
    fake_run(make_args(mode="eagle", question_end=3))
    folder = fake_run(make_args(question_end=3))
    assert summary(folder)["settings"]["mode"] == "both"
