"""Figures from rows, recomputed by hand; and every known bias of public evaluators as a test that fails with it."""

import dataclasses
import json
import random

import numpy as np
import pytest

from fledge.bench.measure import check_generation
from fledge.bench.stats import acceptance, summarise, summarise_set, tau, tau_along_output
from fledge.data.samples import Prompt


def record(tokens, seconds, *, accepted=(), ttft=0.1, depth=0, phases=None):
    forwards = len(accepted) or tokens - 1
    return {
        "num_tokens": tokens, "num_forwards": forwards, "ttft_s": ttft, "decode_s": seconds, "accepted": list(accepted),
        "drafted_depth": depth, "finish_reason": "stop", "phases_s": phases or {"verify": seconds},
    }  # fmt: skip


def row(question, plain, eagle, repeat=0, dataset="d"):
    turns = [{"baseline": plain, "eagle": eagle}]
    return {
        "dataset": dataset, "question_id": str(question), "repeat": repeat, "peak_memory_bytes": 1, "turns": turns,
    }  # fmt: skip


def drifting_rows(*, factor=1.0, questions=80, noise=0.08, seed=3):
    """Plain against plain: lengths and clocks vary, a slow drift hits both sides; `factor` slows one of them."""
    draw = random.Random(seed)
    rows = []
    for question in range(questions):
        drift = 1 + 0.3 * question / questions
        sides = []
        for slow in (1.0, factor):
            tokens = draw.randint(20, 200)
            sides.append(record(tokens, (tokens - 1) * 0.01 * drift * slow * (1 + noise * draw.uniform(-1, 1))))
        rows.append(row(question, *sides))
    return rows


def test_categories_have_figures_of_their_own():
    """Pooled, the good drafts of code hid the bad ones of prose; Spec-Bench and SPEED-Bench report by task."""
    rows = [
        row(number, record(11, 2.0), record(11, 1.0 if number % 2 else 2.0, accepted=accepted, depth=4))
        for number, accepted in enumerate([[1] * 5, [4] * 2, [1] * 5, [4] * 2])
    ]
    for number, one in enumerate(rows):
        one["category"] = "code" if number % 2 else "prose"
    found = summarise(rows)["d"]["categories"]
    assert {name: one["tau"] for name, one in found.items()} == {"code": 5.0, "prose": 2.0}
    assert {name: one["speedup"]["value"] for name, one in found.items()} == {"code": 2.0, "prose": 1.0}
    assert [one["questions"] for one in found.values()] == [2, 2]
    for one in rows:  # of one category, or of none: nothing to tell apart
        one["category"] = ""
    assert summarise(rows)["d"]["categories"] == {}


# -- the known biases of eagle3-facts 7, by name ----------------------------------------------------------------------


def test_bias_rounds_are_counted_not_indexed():
    """new_tokens / idx: with idx the last index, one round too few is counted and tau comes out too high."""
    generation = record(1 + 3 + 2, 1.0, accepted=[2, 1])  # prefill's token, rounds of 3 and 2 tokens
    assert tau([generation]) == 5 / 2


def test_bias_tokens_after_eos_are_refused(fake_engine):
    engine = fake_engine()
    good = engine.generate("eagle", Prompt([1, 2, 3]), max_new_tokens=100, seed=1)
    check_generation(good, 100, (0,))
    good.token_ids.append(77)  # something behind the end-of-sequence token
    good.accepted[-1] += 1
    with pytest.raises(AssertionError, match="after the end-of-sequence"):
        check_generation(good, 100, (0,))


def test_bias_tokens_past_the_limit_are_refused(fake_engine):
    generation = fake_engine().generate("eagle", Prompt([1, 2, 3]), max_new_tokens=10, seed=1)
    with pytest.raises(AssertionError, match="limit 9"):
        check_generation(generation, 9, (0,))


@pytest.mark.parametrize("side", ["baseline", "eagle"])
def test_bias_rounds_and_tokens_must_add_up_on_both_sides(fake_engine, side):
    generation = fake_engine().generate(side, Prompt([1, 2, 3]), max_new_tokens=50, seed=1)
    generation = dataclasses.replace(generation, num_forwards=generation.num_forwards - 1)
    with pytest.raises(AssertionError, match="rounds|plain forwards"):
        check_generation(generation, 50, (0,))


def test_bias_both_sides_count_the_same_tokens():
    """The prefill's own token is left out on both sides, or neither: same text and time give exactly 1."""
    same = row(0, record(11, 1.0), record(11, 1.0, accepted=[4, 4], depth=4))
    assert summarise_set([same, {**same, "question_id": "1"}])["speedup"]["value"] == 1.0


def test_bias_the_ratio_pairs_equal_questions():
    """A question measured on one repeat only must not enter the ratio: means over different questions mislead."""
    fast, slow = record(101, 1.0), record(101, 10.0)
    rows = [row(0, fast, fast, repeat=0), row(0, fast, fast, repeat=1), row(1, fast, slow, repeat=0)]
    assert summarise_set(rows)["speedup"]["value"] == 1.0


def test_bias_every_turn_counts():
    """MT-bench turn 1 only: the second turn's rounds belong to tau."""
    one = row(0, record(5, 1.0), record(5, 1.0, accepted=[3], depth=3))
    one["turns"].append({"baseline": record(5, 1.0), "eagle": record(5, 1.0, accepted=[0, 0, 0, 0], depth=3)})
    assert acceptance([one])["tau"] == 8 / 5


# -- definitions ------------------------------------------------------------------------------------------------------


def test_promises_are_compared_with_what_was_kept():
    """By position, over the rounds that drafted as far; rounds without a promise do not count."""
    rounds = [
        {"kept": [], "promised": []}, {"kept": ["a", "b"], "promised": [0.75, 0.5]},
        {"kept": [], "promised": [0.25, 0.25]}, {"kept": ["a"], "promised": [0.5]},
    ]  # fmt: skip
    one = row(0, record(7, 1.0), record(7, 1.0, accepted=[2, 2], depth=3))
    assert acceptance([one])["calibration"] == []
    one["turns"][0]["sample"] = rounds
    assert acceptance([one])["calibration"] == [
        {"rounds": 3, "predicted": 0.5, "accepted": 2 / 3}, {"rounds": 2, "predicted": 0.375, "accepted": 0.5},
    ]  # fmt: skip


def test_tau_micro_pools_rounds_and_macro_averages_questions():
    rows = [
        row(0, record(7, 1.0), record(7, 1.0, accepted=[2, 2], depth=3)),  # 6 / 2
        row(1, record(5, 1.0), record(5, 1.0, accepted=[0, 0, 0, 0], depth=3)),  # 4 / 4
    ]
    found = acceptance(rows)
    assert found["tau"] == 10 / 6 and found["tau_macro"] == 2.0
    assert found["by_position"] == [2 / 6, 2 / 6, 0]
    assert found["by_position_conditional"] == [2 / 6, 1.0, 0]
    assert found["length_histogram"] == [4, 0, 2, 0]
    assert found["tau"] == pytest.approx(1 + sum(found["by_position"]))


def test_tau_along_the_output_bins_rounds_by_where_they_begin():
    found = tau_along_output([record(40, 1.0, accepted=[30, 0, 6], depth=30)])
    assert found == [{"from": 0, "to": 32, "tau": 31.0, "rounds": 1}, {"from": 32, "to": 64, "tau": 4.0, "rounds": 2}]


def test_speed_model_takes_tau_apart():
    """Costs in units of a plain token: verify 1.5, draft 0.3, rest 0.2; tau 3: 3 / 2 = 1.5 times as fast."""
    phases = {"verify": 0.15, "draft": 0.03, "accept": 0.015, "other": 0.005, "prefill": 9.0}
    rows = [row(n, record(31, 3.0), record(31, 0.2 * 10, accepted=[2] * 10, depth=3,
                phases={name: 10 * cost for name, cost in phases.items()})) for n in range(2)]  # fmt: skip
    figures = summarise_set(rows)
    model = figures["model"]
    assert model["verify_cost"] == pytest.approx(1.5) and model["draft_cost"] == pytest.approx(0.3)
    assert model["overhead_cost"] == pytest.approx(0.2)
    assert [model[key] for key in ("free", "ideal", "after_draft", "predicted")] == pytest.approx(
        [3.0, 3 / 1.3, 3 / 1.8, 1.5]
    )
    assert figures["speedup"]["value"] == pytest.approx(model["predicted"])


def test_answers_of_one_token_have_no_speed():
    figures = summarise_set([row(n, record(1, 0.0), record(1, 0.0)) for n in range(3)])
    assert figures["speedup"] is None and figures["baseline"]["tokens_per_s"] is None


def test_median_over_repeats_ignores_one_bad_repeat():
    rows = []
    for repeat, slow in enumerate((1.0, 1.0, 5.0)):
        rows += [row(n, record(101, 2.0), record(101, slow), repeat=repeat) for n in range(4)]
    speedup = summarise_set(rows)["speedup"]
    assert speedup["value"] == pytest.approx(2.0) and len(speedup["per_repeat"]) == 3


# -- what a sceptic asks for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_plain_against_plain_contains_one(seed):
    speedup = summarise_set(drifting_rows(seed=seed))["speedup"]
    assert speedup["low"] <= 1.0 <= speedup["high"]
    assert speedup["high"] - speedup["low"] < 0.1  # and the interval is not empty talk


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slow_down_of_ten_percent_is_detected(seed):
    speedup = summarise_set(drifting_rows(factor=1.1, seed=seed))["speedup"]
    assert speedup["high"] < 1.0 and speedup["low"] < 1 / 1.1 < speedup["high"]


def test_golden_summary_equals_figures_recomputed_from_the_file(make_args, fake_run):
    """From results.jsonl alone, with nothing but arithmetic."""
    folder = fake_run(make_args(repeats=3, question_end=12))
    summary = json.loads((folder / "summary.json").read_text())["sets"]["quick"]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    plain = [turn["baseline"] for one in rows for turn in one["turns"]]
    eagle = [turn["eagle"] for one in rows for turn in one["turns"]]
    tokens, rounds = sum(len(one["token_ids"]) - 1 for one in eagle), sum(len(one["accepted"]) for one in eagle)
    assert summary["acceptance"]["tau"] == pytest.approx(tokens / rounds)
    first = sum(kept >= 1 for one in eagle for kept in one["accepted"]) / rounds
    assert summary["acceptance"]["by_position"][0] == pytest.approx(first)
    assert summary["eagle"]["tokens_per_s"] == pytest.approx(tokens / sum(one["decode_s"] for one in eagle))
    ratios = []
    for repeat in range(3):
        mine = [turn for one in rows if one["repeat"] == repeat for turn in one["turns"]]
        speeds = [
            sum(len(turn[side]["token_ids"]) - 1 for turn in mine) / sum(turn[side]["decode_s"] for turn in mine)
            for side in ("eagle", "baseline")
        ]
        ratios.append(speeds[0] / speeds[1])
    assert summary["speedup"]["value"] == pytest.approx(float(np.median(ratios)))
    assert summary["baseline"]["ttft_s_median"] == pytest.approx(np.median([one["ttft_s"] for one in plain]))
    assert summary["questions"] == 12 and summary["repeats"] == 3


def test_all_sets_together_pool_the_rows():
    rows = [row(0, record(11, 1.0), record(11, 0.5), dataset=name) for name in ("a", "b")]
    summary = summarise(rows)
    assert list(summary) == ["a", "b", "all"] and summary["all"]["questions"] == 2
