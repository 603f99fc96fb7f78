"""What people read: complete, self-contained, legible in both themes, and the same figures everywhere."""

import json
import re

import pytest

from fledge.bench.report import TEMPLATES
from fledge.bench.verdict import MIN_QUESTIONS, verdict
from fledge.commands.report import ReportArgs, report
from fledge.errors import UserError


@pytest.fixture
def folder(make_args, fake_run):
    return fake_run(make_args(question_end=6))


def test_the_page_needs_no_network(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=|@import|url\(|<script|<link|https?://""", page)


def test_the_page_shows_every_part(folder):
    page = (folder / "report.html").read_text()
    parts = (
        "Results per data set", "Speed-up", "Where the time goes", "From τ to the speed-up", "Draft tokens kept",
        "Acceptance by position", "given the one before", "τ along the answer", "Promised and kept",
        "Are the answers as good", "What drafting looks like", "How it was measured",
    )  # fmt: skip
    assert [part for part in parts if part not in page] == []
    assert page.count("<svg") == 8


def test_samples_are_escaped_and_coloured(folder):
    page = (folder / "report.html").read_text()
    assert '<span class="kept">&lt;b&gt;</span>' in page and '<span class="refused"> refused &amp; gone</span>' in page


def test_page_and_markdown_show_the_summarys_figures(folder):
    figures = json.loads((folder / "summary.json").read_text())["sets"]["quick"]
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert f"{figures['acceptance']['tau']:.2f}" in text and f"{figures['speedup']['value']:.2f}" in text
        assert f"{figures['eagle']['tokens_per_s']:.1f}" in text


def test_categories_are_shown_where_there_are_several(make_args, fake_run):
    folder = fake_run(make_args(question_end=8))
    figures = json.loads((folder / "summary.json").read_text())["sets"]["quick"]["categories"]
    assert len(figures) > 1
    for name in ("report.html", "report.md"):
        assert all(category in (folder / name).read_text() for category in figures)
    assert "## By category" in (folder / "report.md").read_text()


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_series_have_contrast(theme):
    """WCAG AA: 4.5 for text; series colours colour their labels too, so they get no discount."""
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.html.jinja").read_text(), flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[theme]))
    pairs = [(name, "card") for name in ("ink", "faint", "good", "bad", *(f"s{n}" for n in range(7)))]
    pairs += [("ink", "page"), ("faint", "page"), ("kept-ink", "kept"), ("refused-ink", "refused")]
    weak = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: value for pair, value in weak.items() if value < 4.5} == {}
    assert contrast("#777777", "#808080") < 4.5  # the measure can fail


def quality_of(**more):
    return {"compared": 10, "identical": 10, "ties": 0, "unexplained": 0, **more}


def document(speedup, quality, mode="both", questions=MIN_QUESTIONS):
    side = {"tokens_per_s": 10.0}
    figures = {"questions": questions, "baseline": side, "eagle": side, "speedup": speedup, "quality": quality}
    return {"sets": {"d": figures}, "settings": {"mode": mode}}


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (1.2, 1.3, 1.4, "writes 1.30 times as fast"),
        (0.9, 1.0, 1.1, "No difference in speed can be shown"),
        (0.5, 0.6, 0.7, "slows the model down to 0.60"),
    ],
)
def test_the_verdict_follows_the_interval(low, value, high, words):
    assert words in verdict(document({"low": low, "value": value, "high": high}, quality_of()))


def test_no_verdict_from_fewer_than_ten_questions():
    """One question was enough for "slows the model down" and for "BUT the model does not find both sides' answers
    equally likely". Answers that differ without a near-tie are an error at any number."""
    slow = {"low": 0.5, "value": 0.6, "high": 0.7}
    unlike = {"log_likelihood_difference": {"low": -0.3, "value": -0.2, "high": -0.1}}
    for few in (1, MIN_QUESTIONS - 1):
        interval = slow if few > 1 else {"low": None, "value": 0.6, "high": None}
        said = verdict(document(interval, unlike, questions=few))
        assert f"On {few} question" in said and "0.60 times" in said and "a verdict takes 10" in said
        assert "slows" not in said and "BUT" not in said
        assert "distrust" not in verdict(document(interval, {}, mode="aa", questions=few))
    wrong = quality_of(compared=1, identical=0, unexplained=1)
    assert "BUT 1 of 1 answer differs" in verdict(document(slow, wrong, questions=1))
    said = verdict(document(slow, unlike))  # negative control: enough
    assert "slows" in said and "BUT" in said


@pytest.mark.parametrize(("quality", "words"), [
    (quality_of(compared=1, identical=1), "and the answer is identical."),
    (quality_of(compared=2, identical=2), "all 2 answers are identical."),
    (quality_of(compared=2, identical=1, ties=1), "1 of 2 answers is identical, the other parts at"),
    (quality_of(compared=4, identical=2, ties=2), "2 of 4 answers are identical, the others part at"),
    (quality_of(compared=4, identical=0, ties=4), "none of 4 answers is identical, they part at"),
    (quality_of(compared=1, identical=0, ties=1), "the answer is not identical, it parts at"),
    (quality_of(compared=4, identical=2, unexplained=2), "BUT 2 of 4 answers differ where"),
    (quality_of(compared=2, identical=1, unchecked=1), "Whether the other parts at a near-tie"),
])  # fmt: skip
def test_counts_and_their_words_agree(quality, words):
    """The first sentence read "all 1 answers are identical"."""
    assert words in verdict(document({"low": 1.2, "value": 1.3, "high": 1.4}, quality))


SPECULATIVE = re.compile(r"draft|τ|\btau|speed-up|speculat|with the head|eagle", re.IGNORECASE)


def shown(folder, name):
    """What a page says: without style, settings and command."""
    text = (folder / name).read_text().split("How it was measured")[0]
    return re.sub(r"<style>.*?</style>|<head>.*?</head>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_report_of_plain_decoding_alone_has_no_words_of_drafting(make_args, fake_run, temperature, capsys):
    """It explained tau, the speed-up and "plain / with the head" beside columns of dashes."""
    args = make_args(mode="baseline", question_end=3, temperature=temperature)
    folder = fake_run(args)
    for name in ("report.html", "report.md"):
        assert SPECULATIVE.search(shown(folder, name)) is None
        assert "–" not in shown(folder, name).replace("– fledge", "")
    assert "tau" not in capsys.readouterr().out
    both = fake_run(make_args(question_end=3, output_dir=args.output_dir / "both"))
    assert len(set(SPECULATIVE.findall(shown(both, "report.html")))) > 3  # negative control


def test_a_noise_run_names_no_head(make_args, fake_run):
    folder = fake_run(make_args(mode="aa", question_end=3))
    assert "with the draft head" not in shown(folder, "report.html") and "again" in shown(folder, "report.html")


def test_columns_without_a_figure_are_left_out_and_the_speed_up_comes_early(make_args, fake_run):
    """On a phone the first two or three columns of the table are visible; the speed-up was the fifth."""
    folder = fake_run(make_args(question_end=3))
    head = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| data set"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns.index("speed-up (95 %)") <= 2
    assert "identical" in columns
    sampled = fake_run(make_args(question_end=3, temperature=0.7))
    assert "identical" not in (sampled / "report.md").read_text().split("tau =")[0]


def test_the_verdict_never_hides_wrong_answers():
    fast = {"low": 1.2, "value": 1.3, "high": 1.4}
    assert "all 10 answers are identical" in verdict(document(fast, quality_of()))
    assert "near-tie" in verdict(document(fast, quality_of(identical=9, ties=1)))
    assert "BUT 1 of 10" in verdict(document(fast, quality_of(identical=9, unexplained=1)))
    off = {"log_likelihood_difference": {"low": -0.3, "value": -0.2, "high": -0.1}}
    assert "BUT the model does not find" in verdict(document(fast, off))
    off["log_likelihood_difference"]["high"] = 0.1
    assert "equally likely" in verdict(document(fast, off))


def test_report_compares_runs_and_says_what_differed(make_args, fake_run, fake_engine, tmp_path, capsys):
    slow = fake_run(make_args(output_dir=tmp_path / "a", model_id="slow"), fake_engine(slowdown=1.3))
    fast = fake_run(make_args(output_dir=tmp_path / "b", model_id="fast", depth=7), fake_engine())
    report(ReportArgs(paths=(slow, fast / "summary.json"), output=tmp_path / "both.md"))
    text = (tmp_path / "both.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| quick")]
    assert "slow" in lines[0] and "first" in lines[0]
    assert re.search(r"fast .*\+(2[4-9]|3[0-6])\.\d% \(clear\)", lines[1])
    assert "differ in depth: None | 7" in text
    report(ReportArgs(paths=(slow, slow), output=tmp_path / "same.json"))
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["rows"][1]["against the first"] == "+0.0% (intervals overlap)" and same["different"] == {}


def test_report_draws_one_run_again(folder):
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    report(ReportArgs(paths=(folder,)))
    assert (folder / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such file"), ("{", "not valid JSON"), ("{}", "not the summary")]
)
def test_what_is_no_summary_is_refused(tmp_path, text, message):
    path = tmp_path / "summary.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        report(ReportArgs(paths=(path,)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.update(sets={}),
        lambda document: document.update(sets=[1]),
        lambda document: document.update(settings=None),
        lambda document: document.pop("fingerprint"),
        lambda document: document["sets"]["quick"].update(speedup=[1]),
        lambda document: document["sets"]["quick"].pop("quality"),
        lambda document: document["sets"]["quick"]["acceptance"].update(by_position=7),
        lambda document: document["sets"]["quick"]["eagle"].update(tokens_per_s="fast"),
        lambda document: document["sets"]["quick"]["acceptance"].update(rounds=0),
    ],
)
def test_a_summary_that_cannot_be_drawn_is_named(folder, spoil):
    """Summaries are exchanged; a wrong figure in one ended in a traceback."""
    document = json.loads((folder / "summary.json").read_text())
    report(ReportArgs(paths=(folder,)))
    spoil(document)
    (folder / "summary.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"summary.json: "):
        report(ReportArgs(paths=(folder,)))
