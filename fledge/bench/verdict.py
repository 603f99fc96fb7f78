"""The sentence a report begins with: what the figures show, and what they do not.

Knows the figures of a summary. A ratio of speeds and a difference in likelihood are judged from MIN_QUESTIONS on;
below, the sentence only says what was measured. Answers that differ without a near-tie are an error at any number.
"""

from typing import Any

from fledge.console import counted, form

Document = dict[str, Any]
MIN_QUESTIONS = 10


def headline(document: Document) -> dict[str, Any]:
    """The figures a report leads with: all sets together, else the only one."""
    sets = document["sets"]
    return sets.get("all") or next(iter(sets.values()))


def verdict(document: Document) -> str:
    """One sentence for somebody who knows nothing of the method."""
    figures = headline(document)
    speedup = figures.get("speedup")
    if "eagle" not in figures:
        return f"The model alone writes {figures['baseline']['tokens_per_s'] or 0:.1f} tokens per second."
    if "baseline" not in figures:
        accepted = figures.get("acceptance", {}).get("tau")
        return (
            f"With this draft head the model writes {figures['eagle']['tokens_per_s'] or 0:.1f} tokens per second"
            + (f", {accepted:.2f} tokens per step" if accepted else "")
            + "; without a plain run beside it there is no speed-up to state."
        )
    if speedup is None:
        return "The answers are too short to measure a speed-up."
    enough = figures["questions"] >= MIN_QUESTIONS and speedup["low"] is not None
    if is_noise_run(document):
        return _noise_sentence(speedup, figures["questions"], enough)
    clause = _speed_clause(speedup) if enough else _measured_clause(speedup, figures["questions"])
    return clause + _quality_clause(figures.get("quality", {}), enough)


def is_noise_run(document: Document) -> bool:
    """Whether both sides are plain decoding (`--mode aa`)."""
    return document["settings"].get("mode") == "aa"


def interval_text(value: dict[str, Any] | None, digits: int = 2) -> str:
    """`1.62 (1.55 to 1.70)`."""
    if value is None:
        return "–"
    text = f"{value['value']:.{digits}f}"
    return text if value["low"] is None else f"{text} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _noise_sentence(speedup: dict[str, Any], questions: int, enough: bool) -> str:
    sentence = f"Plain decoding against itself: ratio {interval_text(speedup)} on {counted(questions, 'question')}."
    if not enough:
        return f"{sentence} A verdict takes {MIN_QUESTIONS}."
    if speedup["low"] <= 1.0 <= speedup["high"]:
        return f"{sentence} As it should, the interval contains 1."
    return f"{sentence} The interval should contain 1: distrust timings."


def _measured_clause(speedup: dict[str, Any], questions: int) -> str:
    return (
        f"On {counted(questions, 'question')} this draft head gave {speedup['value']:.2f} times the plain speed "
        f"(a verdict takes {MIN_QUESTIONS} questions)"
    )


def _speed_clause(speedup: dict[str, Any]) -> str:
    low, high, value = speedup["low"], speedup["high"], speedup["value"]
    if low <= 1.0 <= high:
        return f"No difference in speed can be shown: {interval_text(speedup)} of the plain model's"
    interval = f"(95 % interval {low:.2f} to {high:.2f})"
    if value > 1:
        return f"With this draft head the model writes {value:.2f} times as fast {interval}"
    return f"This draft head slows the model down to {value:.2f} of its plain speed {interval}"


def _quality_clause(quality: dict[str, Any], enough: bool) -> str:
    if quality.get("compared"):
        return _identical_clause(quality)
    difference = quality.get("log_likelihood_difference")
    if enough and difference and difference["low"] is not None:
        if difference["low"] <= 0 <= difference["high"]:
            return ", and the model finds both sides' answers equally likely."
        return ", BUT the model does not find both sides' answers equally likely: look at the quality section."
    return "."


def _identical_clause(quality: dict[str, Any]) -> str:
    compared, identical = quality["compared"], quality["identical"]
    different = compared - identical
    if not different:
        return ", and the answer is identical." if compared == 1 else f", and all {compared} answers are identical."
    if wrong := quality.get("unexplained"):
        return (
            f", BUT {wrong} of {counted(compared, 'answer')} {form(wrong, 'differs', 'differ')} where the model "
            f"has a clear favourite: that is an error, not rounding."
        )
    if identical:
        same = f"{identical} of {compared} answers {form(identical, 'is', 'are')} identical"
        rest = form(different, "the other parts", "the others part")
    else:
        same = form(compared, "the answer is not identical", f"none of {compared} answers is identical")
        rest = form(compared, "it parts", "they part")
    if "unchecked" in quality:
        return f"; {same}. Whether {rest} at a near-tie of the model's scores was not checked."
    return f"; {same}, {rest} at a near-tie of the model's own scores, which rounding decides."
