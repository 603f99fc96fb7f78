"""What people read: complete, self-contained, legible in both themes, and the same figures everywhere."""

import json
import re

import pytest

from fledge.bench.report import TEMPLATES, verdict
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


def document(speedup, quality, mode="both"):
    side = {"tokens_per_s": 10.0}
    return {"sets": {"d": {"baseline": side, "eagle": side, "speedup": speedup, "quality": quality}},
            "settings": {"mode": mode}}  # fmt: skip


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (1.2, 1.3, 1.4, "writes 1.30 times as fast"),
        (0.9, 1.0, 1.1, "No difference in speed can be shown"),
        (0.5, 0.6, 0.7, "slows the model down to 0.60"),
        (None, 1.3, None, "One question only"),
    ],
)
def test_the_verdict_follows_the_interval(low, value, high, words):
    assert words in verdict(document({"low": low, "value": value, "high": high}, quality_of()))


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
