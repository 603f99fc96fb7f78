"""Rows to figures: tau, acceptance, speed-up with interval, where the time goes. Pure functions of rows.

tau    = tokens per verification round = sum(emitted - 1) / rounds; the prefill's own token belongs to no round
micro  = pooled over all rounds;  macro = mean over questions
speed  = sum(emitted - 1) / sum(decode_s), the time to the first token left out (it is reported apart)
S      = speculative speed / plain speed over the same questions; median over repeats; the interval resamples
         whole questions, since the rounds of one answer are not independent
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fledge.bench.rows import Row

BOOTSTRAP_DRAWS = 2000
POSITION_BINS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def summarise(rows: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """Figures per data set and, when there are several, of all together."""
    by_set = {
        name: [row for row in rows if row["dataset"] == name] for name in dict.fromkeys(r["dataset"] for r in rows)
    }
    summary = {
        name: {**summarise_set(mine, seed=seed), "categories": by_category(mine, seed=seed)}
        for name, mine in by_set.items()
    }
    if len(by_set) > 1:
        summary["all"] = summarise_set(rows, seed=seed)
    return summary


def summarise_set(rows: Sequence[Row], *, seed: int = 0) -> dict[str, Any]:
    """Figures of one set of rows."""
    sides = [side for side in ("baseline", "eagle") if side in rows[0]["turns"][0]]
    figures: dict[str, Any] = {
        "questions": len({(row["dataset"], row["question_id"]) for row in rows}),
        "repeats": len({row["repeat"] for row in rows}),
        "turns": sum(len(row["turns"]) for row in rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        **{side: side_figures(rows, side) for side in sides},
    }
    if len(sides) == 2:
        figures["speedup"] = speedup(rows, seed=seed)
        figures["speedup_with_prefill"] = speedup(rows, seed=seed, with_prefill=True)
    if "eagle" in sides and any(turn["eagle"]["accepted"] for row in rows for turn in row["turns"]):
        figures["acceptance"] = acceptance(rows)
        if len(sides) == 2:
            figures["model"] = speed_model(figures)
    figures["quality"] = quality(rows, sides, seed=seed)
    return figures


def by_category(rows: Sequence[Row], *, seed: int) -> dict[str, Any]:
    """tau and speed-up of every category of the questions; none where all are of one."""
    names = sorted({row.get("category") or "" for row in rows})
    if len(names) < 2:
        return {}
    grouped = {name: [row for row in rows if (row.get("category") or "") == name] for name in names}
    return {name or "none": _category(mine, seed) for name, mine in grouped.items()}


def _category(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    sides = rows[0]["turns"][0].keys()
    drafted = "eagle" in sides and any(turn["eagle"].get("accepted") for row in rows for turn in row["turns"])
    return {
        "questions": len({(row["dataset"], row["question_id"]) for row in rows}),
        "tau": tau(records(rows, "eagle")) if drafted else None,
        "speedup": speedup(rows, seed=seed) if {"baseline", "eagle"} <= sides else None,
    }


def records(rows: Sequence[Row], side: str) -> list[dict[str, Any]]:
    """Every turn's record of one side."""
    return [turn[side] for row in rows for turn in row["turns"]]


def decoded_tokens(record: dict[str, Any]) -> int:
    """Tokens that decoding made: all but the prefill's own."""
    return record["num_tokens"] - 1


def tau(some: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per target forward, pooled."""
    rounds = sum(record["num_forwards"] for record in some)
    return sum(map(decoded_tokens, some)) / rounds if rounds else None


def side_figures(rows: Sequence[Row], side: str) -> dict[str, Any]:
    """Speed, length and time split of one side."""
    some = records(rows, side)
    seconds, tokens = sum(record["decode_s"] for record in some), sum(map(decoded_tokens, some))
    phases = list(dict.fromkeys(phase for record in some for phase in record["phases_s"]))
    return {
        "tokens": sum(record["num_tokens"] for record in some),
        "decode_tokens": tokens,
        "decode_s": seconds,
        "forwards": sum(record["num_forwards"] for record in some),
        "tokens_per_s": tokens / seconds if seconds else None,
        "ttft_s_median": float(np.median([record["ttft_s"] for record in some])),
        "ttft_s_total": sum(record["ttft_s"] for record in some),
        "phases_s": {phase: sum(record["phases_s"].get(phase, 0.0) for record in some) for phase in phases},
        "stopped_at_limit": sum(record["finish_reason"] == "length" for record in some),
    }


def speedup(rows: Sequence[Row], *, seed: int, with_prefill: bool = False) -> dict[str, Any] | None:
    """Median over repeats of the pooled speed ratio, with a 95 % bootstrap interval over questions."""
    table = speed_table(rows, with_prefill=with_prefill)  # (R, Q, 4)
    per_repeat = pooled_ratio(table.sum(axis=1))
    if not np.all(np.isfinite(per_repeat)):
        return None
    drawn = np.einsum("bq,rqk->brk", resampled(table.shape[1], seed), table)
    low, high = interval(np.median(pooled_ratio(drawn), axis=-1)) if table.shape[1] > 1 else (None, None)
    return {"value": float(np.median(per_repeat)), "low": low, "high": high, "per_repeat": per_repeat.tolist()}


def speed_table(rows: Sequence[Row], *, with_prefill: bool = False) -> np.ndarray:
    """(repeats, questions, 4): plain tokens and seconds, speculative tokens and seconds; complete questions only."""
    repeats = sorted({row["repeat"] for row in rows})
    by_key = {(row["repeat"], row["dataset"], row["question_id"]): row for row in rows}
    questions = [
        key
        for key in dict.fromkeys((row["dataset"], row["question_id"]) for row in rows)
        if all((repeat, *key) in by_key for repeat in repeats)
    ]
    table = np.zeros((len(repeats), len(questions), 4))
    for r, repeat in enumerate(repeats):
        for q, key in enumerate(questions):
            for s, side in enumerate(("baseline", "eagle")):
                some = records([by_key[(repeat, *key)]], side)
                seconds = sum(one["decode_s"] + (one["ttft_s"] if with_prefill else 0.0) for one in some)
                tokens = sum(one["num_tokens"] if with_prefill else decoded_tokens(one) for one in some)
                table[r, q, 2 * s : 2 * s + 2] = tokens, seconds
    return table


def pooled_ratio(sums: np.ndarray) -> np.ndarray:
    """Speculative over plain speed from summed tokens and seconds (..., 4); NaN where nothing was decoded."""
    plain_tokens, plain_s, tokens, seconds = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return tokens * plain_s / (seconds * plain_tokens)


def resampled(count: int, seed: int) -> np.ndarray:
    """(draws, count): how often each of `count` things is drawn in every bootstrap sample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP_DRAWS)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def acceptance(rows: Sequence[Row]) -> dict[str, Any]:
    """tau, acceptance by position, accepted lengths and tau along the output, of the speculative side."""
    some = records(rows, "eagle")
    lengths = [kept for record in some for kept in record["accepted"]]
    depth = max(record["drafted_depth"] for record in some)
    reached = [sum(kept >= position for kept in lengths) for position in range(depth + 1)]  # reached[0] = all rounds
    per_question = [tau(records([row], "eagle")) for row in rows]
    return {
        "tau": tau(some),
        "tau_macro": float(np.mean([value for value in per_question if value is not None])),
        "rounds": len(lengths),
        "drafted_depth": depth,
        "by_position": [count / reached[0] for count in reached[1:]],
        "by_position_conditional": [
            after / before if before else None for before, after in zip(reached, reached[1:], strict=False)
        ],
        "length_histogram": [sum(kept == length for kept in lengths) for length in range(depth + 1)],
        "along_output": tau_along_output(some),
        "calibration": calibration(rows),
    }


def tau_along_output(some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """tau of the rounds that began at each stretch of the answer."""
    emitted, rounds = [0] * len(POSITION_BINS), [0] * len(POSITION_BINS)
    for record in some:
        position = 1  # the prefill's own token
        for kept in record["accepted"]:
            where = max(index for index, start in enumerate(POSITION_BINS) if start <= position)
            emitted[where] += kept + 1
            rounds[where] += 1
            position += kept + 1
    ends = [*POSITION_BINS[1:], None]
    return [
        {"from": start, "to": end, "tau": emitted[index] / rounds[index], "rounds": rounds[index]}
        for index, (start, end) in enumerate(zip(POSITION_BINS, ends, strict=True))
        if rounds[index]
    ]


def calibration(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By position, over the traced rounds that drafted as far: the mean chance that the drafter gave its drafts to be
    kept up to there, and the share of rounds that kept them."""
    rounds = [one for row in rows for turn in row["turns"] for one in turn.get("sample", ()) if one.get("promised")]
    found = []
    for position in range(max((len(one["promised"]) for one in rounds), default=0)):
        drafted = [one for one in rounds if len(one["promised"]) > position]
        found.append({
            "rounds": len(drafted),
            "predicted": float(np.mean([one["promised"][position] for one in drafted])),
            "accepted": float(np.mean([len(one["kept"]) > position for one in drafted])),
        })  # fmt: skip
    return found


def speed_model(figures: dict[str, Any]) -> dict[str, Any]:
    """Where tau goes on its way to the speed-up: S = tau / (V(n)/V(1) + draft/V(1) + o/V(1)), per round.

    Each stage adds one cost, so the figures fall from tau (everything but the target's own forward free) to S.
    """
    plain, eagle = figures["baseline"], figures["eagle"]
    rounds, mean_tau = eagle["forwards"], figures["acceptance"]["tau"]
    unit_s = plain["decode_s"] / plain["forwards"]  # V(1): one plain token, all its own overhead included
    phases = eagle["phases_s"]
    verify, draft = phases.get("verify", 0.0), phases.get("draft", 0.0)
    rest = eagle["decode_s"] - verify - draft
    verify, draft, rest = (seconds / rounds / unit_s for seconds in (verify, draft, rest))
    return {
        "plain_forward_s": unit_s,
        "verify_cost": verify,
        "draft_cost": draft,
        "overhead_cost": rest,
        "free": mean_tau,
        "after_verify": mean_tau / verify if verify else None,
        "after_draft": mean_tau / (verify + draft) if verify else None,
        "ideal": mean_tau / (1.0 + draft),
        "predicted": mean_tau / (verify + draft + rest),
    }


def quality(rows: Sequence[Row], sides: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Identical outputs, log-likelihood difference and task scores, whichever the rows have."""
    checks = [turn["check"] for row in rows for turn in row["turns"] if turn.get("check")]
    figures: dict[str, Any] = {}
    compared = [check for check in checks if "identical" in check]
    if compared:
        different = [check for check in compared if not check["identical"]]
        figures |= {
            "compared": len(compared),
            "identical": len(compared) - len(different),
            "ties": sum(check["tie"] for check in different),
            "unexplained": sum(not check["tie"] for check in different),
            "largest_gap": max((check["gap"] for check in different), default=None),
        }
    likelihoods = {
        side: [check[f"{side}_log_likelihood"] for check in checks if f"{side}_log_likelihood" in check]
        for side in sides
    }
    if checks and all(likelihoods.values()):
        figures["log_likelihood"] = {side: float(np.mean(values)) for side, values in likelihoods.items()}
        if len(sides) == 2:
            difference = np.array(likelihoods["eagle"]) - np.array(likelihoods["baseline"])
            count = len(difference)
            low, high = interval(resampled(count, seed) @ difference / count) if count > 1 else (None, None)
            figures["log_likelihood_difference"] = {"value": float(difference.mean()), "low": low, "high": high}
    scores = {
        side: [row["score"][side] for row in rows if (row.get("score") or {}).get(side) is not None] for side in sides
    }
    if all(scores.values()):
        figures["score"] = {side: float(np.mean(values)) for side, values in scores.items()}
        figures["scored"] = len(scores[sides[0]])
    return figures
