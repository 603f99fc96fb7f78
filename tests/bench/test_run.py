"""A whole benchmark with a lookup-table model: what is measured, what survives, what the flags change."""

import dataclasses
import json

import pytest

from fledge.bench.measure import Job, MeasureSettings, measure
from fledge.bench.questions import Question
from fledge.bench.rows import read_rows
from fledge.bench.run import Placement, list_jobs, place
from fledge.data.samples import Prompt
from fledge.decoding.requests import PromptTooLong
from fledge.errors import UserError

SETTINGS = MeasureSettings(sides=("baseline", "eagle"), temperature=0.0, max_new_tokens=40, seed=1)
TWO_TURNS = Question("d", "q", "c", ("first question", "second question"))


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_one_run_writes_rows_summary_and_both_reports(make_args, fake_run):
    folder = fake_run(make_args(question_end=4))
    assert files(folder) == ["report.html", "report.md", "results.jsonl", "run.json", "summary.json"]
    assert len(read_rows(folder / "results.jsonl")) == 4
    document = json.loads((folder / "summary.json").read_text())
    assert {"versions", "hardware", "commit", "command", "config"} <= set(document["provenance"])


def test_sides_alternate_turn_by_turn_and_see_the_same_prompt(fake_engine):
    """Drift must hit both sides, and neither may always go first; the second turn continues the plain answer."""
    engine = fake_engine()
    measure(engine, Job(TWO_TURNS, repeat=0, index=0), SETTINGS)
    assert [call[0] for call in engine.calls] == ["baseline", "eagle", "eagle", "baseline"]
    prompts = [call[1] for call in engine.calls]
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3]
    answer = engine.text(
        fake_engine().generate("baseline", Prompt(list(prompts[0])), max_new_tokens=40, seed=0).token_ids
    )
    assert bytes(prompts[2]).decode() == f"u:first question|a:{answer}|u:second question"
    engine.calls.clear()
    measure(engine, Job(TWO_TURNS, repeat=1, index=0), SETTINGS)
    assert engine.calls[0][0] == "eagle"


def test_both_sides_share_the_seed_and_nothing_else_does(fake_engine):
    engine = fake_engine()
    for repeat in range(2):
        measure(engine, Job(TWO_TURNS, repeat=repeat, index=0), SETTINGS)
    seeds = [call[3] for call in engine.calls]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3] and len(set(seeds)) == 4


def test_warm_up_comes_first_and_is_not_counted(make_args, fake_run, fake_engine):
    engine = fake_engine()
    folder = fake_run(make_args(question_end=1, samples=0), engine)
    assert [call[0] for call in engine.calls] == ["baseline", "eagle"] * 2
    assert len(read_rows(folder / "results.jsonl")) == 1


def test_samples_are_generated_apart_with_tracing(make_args, fake_run, fake_engine):
    engine = fake_engine()
    folder = fake_run(make_args(question_end=3, samples=1), engine)
    assert sum(call[4] for call in engine.calls) == 1  # only the sample is traced: tracing costs time
    rows = read_rows(folder / "results.jsonl")
    assert ["sample" in one["turns"][0] for one in rows] == [True, False, False]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_an_interrupted_run_keeps_its_rows_and_continues(make_args, fake_run, fake_engine, monkeypatch, error):
    engine = fake_engine()
    args = make_args(question_end=6)
    whole, stop_after = engine.generate, 9

    def stopping(*words, **more):
        if len(engine.calls) >= stop_after:
            raise error
        return whole(*words, **more)

    monkeypatch.setattr(engine, "generate", stopping)
    with pytest.raises(error):
        fake_run(args, engine)
    kept = read_rows(args.output_dir / "results.jsonl")
    assert 0 < len(kept) < 6
    fake_run(args)
    rows = read_rows(args.output_dir / "results.jsonl")
    assert rows[: len(kept)] == kept and len({one["question_id"] for one in rows}) == len(rows) == 6


def test_a_finished_run_measures_nothing_again(make_args, fake_run, fake_engine):
    fake_run(make_args(question_end=3))
    engine = fake_engine()
    fake_run(make_args(question_end=3), engine)
    assert engine.calls == []


def test_rows_of_other_settings_do_not_enter_the_summary(make_args, fake_run, fake_engine):
    fake_run(make_args(question_end=3), fake_engine(slowdown=5.0), settings={"mode": "both", "seed": 1, "depth": 9})
    folder = fake_run(make_args(question_end=3), settings={"mode": "both", "seed": 1, "depth": 5})
    assert json.loads((folder / "summary.json").read_text())["sets"]["quick"]["speedup"]["value"] > 1
    assert len(list(folder.glob("results-*.jsonl"))) == 1


def test_an_edited_question_is_another_question(make_args, fake_run, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"turns": ["old words"]}')
    fake_run(make_args(bench_name=(str(path),)))
    path.write_text('{"turns": ["new words"]}')
    folder = fake_run(make_args(bench_name=(str(path),)))
    rows = read_rows(folder / "results.jsonl")
    assert [one["question"] for one in rows] == ["old words", "new words"]
    assert json.loads((folder / "summary.json").read_text())["sets"]["own"]["questions"] == 1


# -- flags ------------------------------------------------------------------------------------------------------------


def test_mode_baseline_and_eagle_measure_one_side(make_args, fake_run, fake_engine, tmp_path):
    for mode, side in (("baseline", "baseline"), ("eagle", "eagle")):
        engine = fake_engine(mode=mode)
        folder = fake_run(make_args(mode=mode, question_end=2, output_dir=tmp_path / mode), engine)
        assert {call[0] for call in engine.calls} == {side}
        figures = json.loads((folder / "summary.json").read_text())["sets"]["quick"]
        assert side in figures and "speedup" not in figures


def test_mode_aa_measures_the_machines_noise(make_args, fake_run):
    folder = fake_run(make_args(mode="aa", repeats=2))
    document = json.loads((folder / "summary.json").read_text())
    speedup = document["sets"]["quick"]["speedup"]
    assert speedup["low"] <= 1.0 <= speedup["high"] and "Plain decoding against itself" in document["verdict"]


def test_an_aa_run_with_a_planted_slow_down_is_noticed(make_args, fake_run, fake_engine):
    folder = fake_run(make_args(mode="aa"), fake_engine(mode="aa", slowdown=1.1))
    document = json.loads((folder / "summary.json").read_text())
    assert document["sets"]["quick"]["speedup"]["high"] < 1.0 and "distrust" in document["verdict"]


def test_max_new_token_limits_every_answer(make_args, fake_run):
    folder = fake_run(make_args(max_new_tokens=7, question_end=3))
    turns = [turn for one in read_rows(folder / "results.jsonl") for turn in one["turns"]]
    assert {turn[side]["num_tokens"] for turn in turns for side in ("baseline", "eagle")} == {7}


def test_repeats_question_range_and_several_sets(make_args, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"turns": ["a"]}\n{"turns": ["b"]}')
    jobs = list_jobs(make_args(bench_name=("quick", str(own)), repeats=2, question_begin=1, question_end=3, samples=1))
    assert [(job.question.dataset, job.question.id, job.repeat) for job in jobs] == [
        ("quick", "quick-01", 0), ("quick", "quick-02", 0), ("quick", "quick-01", 1), ("quick", "quick-02", 1),
        ("own", "1", 0), ("own", "1", 1),
    ]  # fmt: skip
    assert [job.sampled for job in jobs] == [True, False, False, False, True, False]


def test_the_same_set_twice_is_refused(make_args):
    with pytest.raises(UserError, match="named twice"):
        list_jobs(make_args(bench_name=("quick", "quick")))


def test_seed_changes_the_sampling_seeds(make_args, fake_run, fake_engine):
    seeds = []
    for seed in (42, 43):
        engine = fake_engine()
        fake_run(make_args(seed=seed, question_end=1), engine)
        seeds.append([call[3] for call in engine.calls])
    assert not set(seeds[0]) & set(seeds[1])


def test_no_metrics_writes_rows_only(make_args, fake_run):
    folder = fake_run(make_args(no_metrics=True, question_end=2))
    assert files(folder) == ["results.jsonl", "run.json"]
    (first, _) = read_rows(folder / "results.jsonl")
    assert "score" not in first and "check" not in first["turns"][0] and "sample" not in first["turns"][0]


def test_temperature_chooses_the_quality_check(make_args, fake_run):
    quality = {}
    for temperature in (0.0, 1.0):
        folder = fake_run(make_args(temperature=temperature, question_end=3))
        quality[temperature] = json.loads((folder / "summary.json").read_text())["sets"]["quick"]["quality"]
    assert quality[0.0]["identical"] == quality[0.0]["compared"] > 0 and "log_likelihood" not in quality[0.0]
    assert quality[1.0]["log_likelihood_difference"]["value"] == 0 and "compared" not in quality[1.0]


def test_different_answers_are_shouted_about(make_args, fake_run, fake_engine):
    """The run ended with status 0, whatever it had found."""
    args = make_args(question_end=7)
    with pytest.raises(UserError, match=r"answers to 6 question.*\(quick quick-00, .* and 1 more\).*report.html"):
        fake_run(args, fake_engine(disagree=True))
    document = json.loads((args.output_dir / "summary.json").read_text())
    assert document["sets"]["quick"]["quality"]["unexplained"] > 0 and "BUT" in document["verdict"]
    assert {"report.html", "report.md"} <= set(files(args.output_dir))


def test_an_answer_that_parts_at_a_near_tie_is_no_error(make_args, fake_run, fake_engine, monkeypatch):
    engine = fake_engine(disagree=True)
    monkeypatch.setattr(engine, "top2", lambda *_: {"gap": 0.0001, "behind": 0.0001, "noise": 0.001})
    folder = fake_run(make_args(question_end=3), engine)
    assert json.loads((folder / "summary.json").read_text())["sets"]["quick"]["quality"]["ties"] == 4


def question_file(path, *questions):
    rows = [{"question_id": number, "turns": list(turns)} for number, turns in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def short_engine(fake_engine, monkeypatch, longest=40):
    """An engine whose target has few positions."""
    engine = fake_engine()
    generate = engine.generate

    def limited(side, prompt, **options):
        if len(prompt) >= longest:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens, but target has {longest} positions")
        return generate(side, prompt, **options)

    monkeypatch.setattr(engine, "generate", limited)
    return engine


def test_a_question_beyond_the_targets_length_is_skipped_by_name(
    make_args, fake_run, fake_engine, monkeypatch, tmp_path
):
    """One such question ended the run, even as the first one, which warms up; its later turns count too."""
    name = question_file(tmp_path / "mine.jsonl", ["long" * 20], ["short"], ["short", "long" * 20], ["brief"])
    args = make_args(bench_name=(name,), max_new_tokens=8, repeats=2)
    folder = fake_run(args, short_engine(fake_engine, monkeypatch))
    document = json.loads((folder / "summary.json").read_text())
    assert [(one["dataset"], one["question_id"]) for one in document["skipped"]] == [("mine", "0"), ("mine", "2")]
    assert document["sets"]["mine"]["questions"] == 2
    for report in ("report.md", "report.html"):
        assert "mine question 2: the prompt has" in (folder / report).read_text()
    engine = short_engine(fake_engine, monkeypatch)
    fake_run(args, engine)  # the same command measures nothing again
    assert engine.calls == []


def test_a_run_that_could_measure_nothing_fails(make_args, fake_run, fake_engine, monkeypatch, tmp_path):
    name = question_file(tmp_path / "mine.jsonl", ["long" * 20])
    with pytest.raises(UserError, match="no question could be measured.*40 positions"):
        fake_run(make_args(bench_name=(name,)), short_engine(fake_engine, monkeypatch))


def test_output_dir_and_model_id_name_the_run(make_args, fake_run, tmp_path):
    args = make_args(output_dir=tmp_path / "elsewhere", model_id="my head", question_end=1)
    folder = fake_run(args)
    assert folder == tmp_path / "elsewhere" and "my head" in (folder / "report.md").read_text()
    assert make_args(output_dir=None, model_id="org/x").output_dir.parts == ("outputs", "bench", "org_x")
    assert make_args(model_id=None, draft="a/b/head-7").model_id == "head-7"


def test_placement_follows_the_gpu_flags(make_args, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert place(make_args(num_gpus_total=8, num_gpus_per_model=2)) == Placement(4, 2)
    assert place(make_args()) == Placement(1, 1)
    assert place(make_args(num_gpus_total=0, num_workers=3)) == Placement(3, 0)
    with pytest.raises(UserError, match="this machine has 8"):
        place(make_args(num_gpus_total=16))


def test_the_documented_default_of_one_gpu_works_without_one(make_args, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert place(make_args(max_gpu_memory="40GiB")) == Placement(1, 0)
    message = capsys.readouterr().err
    assert "no GPU here" in message and "nothing to limit" in message
    with pytest.raises(UserError, match="this machine has 0"):
        place(make_args(num_gpus_total=4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"draft": None}, "--draft is not given"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"total_token": 1}, "--total-token is 1"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"depth": -1}, "--depth is -1"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"num_gpus_total": 3, "num_gpus_per_model": 2}, "not a multiple"),
        ({"num_gpus_total": 0, "max_gpu_memory": "1GiB"}, "uses none"),
        ({"num_gpus_total": 1, "num_workers": 2}, "add --num-gpus-total 0"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(make_args, flags, message):
    with pytest.raises(UserError, match=message):
        make_args(**flags).check()


def test_row_is_plain_json_with_one_line_per_question(make_args, fake_run):
    folder = fake_run(make_args(question_end=5))
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 5 and all(isinstance(json.loads(line), dict) for line in lines)


def test_settings_are_dataclasses_all_the_way(make_args):
    assert dataclasses.asdict(make_args())["model"]["shapes"] == "auto"
