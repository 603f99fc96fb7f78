"""Text from outside is shown, not obeyed: by a terminal, by Markdown, by a browser."""

import json
import re
from html.parser import HTMLParser

import pytest

from fledge.bench.compare import write_comparison
from fledge.bench.report import PAGE, render, table_of
from fledge.commands.report import ReportArgs, report
from fledge.console import say, show_table, warn
from fledge.escaping import markdown, one_line, printable
from fledge.export.card import _command, _header, _table
from fledge.export.layouts import LAYOUTS

HOSTILE = {
    "cell": "a | b",
    "code": "`rm -rf ~`",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "link": "[click](javascript:alert(1)) ![x](http://example.com/track.png)",
    "lines": "one\n# two\r\n| three |",
    "emphasis": "*bold* _italic_ ~~gone~~",
    "entity": "&lt;script&gt; &#60;b&#62;",
    "backslash": "\\| \\`",
    "terminal": "\x1b[2J\x1b]0;title\x07\x9b31m\x08",
    "order": "user\u202etxt.exe",
    "surrogate": "\ud800",
    "end of script": "</script></pre></title>",
    "rich markup": "[red]x[/red] [link=http://example.com]y[/link]",
}
EVERYTHING = " ".join(HOSTILE.values())
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_markdown_is_one_line_without_markup(text):
    shown = markdown(text)
    assert "\n" not in shown and not STEERING.search(shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`<>\[\]*~$]", shown), shown
    unescaped = re.sub(r"\\([^a-z0-9\s])", r"\1", shown)
    assert unescaped == one_line(text)  # nothing is lost


@pytest.mark.parametrize(
    "name",
    ["mt_bench", "SmolLM2-135M-Instruct", "quick × 4", "中文 – naïve", "1.62 (1.55 to 1.70)", "+30.0%", "-1", "–"],
)
def test_ordinary_names_stay_as_they_are(name):
    assert markdown(name) == name == printable(name)


def test_a_line_start_makes_no_list_or_heading():
    assert [markdown(text) for text in ("# x", "- x", "1. x", "1) x")] == ["\\# x", "\\- x", "1\\. x", "1\\) x"]


def test_nothing_printed_steers_the_terminal(capsys):
    say(EVERYTHING)
    warn(EVERYTHING)
    show_table(EVERYTHING, ("a", "b"), [(EVERYTHING, EVERYTHING)])
    shown = capsys.readouterr().err
    assert not STEERING.search(shown)
    assert "\\x1b[2J" in shown and "[red]x[/red]" in shown


# ---- reports ------------------------------------------------------------------------------------------------------


@pytest.fixture
def summary(make_args, fake_run):
    """A real summary whose every name was replaced, and its samples."""
    folder = fake_run(make_args(question_end=3))
    document = json.loads((folder / "summary.json").read_text())
    figures = document["sets"].pop("quick")
    document["sets"] = {EVERYTHING: figures, "other": figures, "all": figures}
    document["model_id"] = document["provenance"]["command"] = EVERYTHING
    document["provenance"]["commit"] = document["provenance"]["time"] = EVERYTHING
    document["settings"] |= {"target": EVERYTHING, EVERYTHING: [EVERYTHING]}
    document["skipped"] = [{"dataset": EVERYTHING, "question_id": EVERYTHING, "reason": EVERYTHING}]
    return document


def sample() -> dict:
    rounds = [{"kept": [EVERYTHING], "refused": EVERYTHING, "bonus": EVERYTHING}]
    return {"dataset": EVERYTHING, "question": EVERYTHING, "rounds": rounds}


def test_report_md_has_the_structure_of_its_template_whatever_the_names_are(summary):
    text = render("report.md.jinja", summary, [])
    assert not STEERING.search(text)
    assert "<script" not in text.replace("\\<script", "").replace(one_line(EVERYTHING), "")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in tables[:5]}
    assert widths == {len(table_of(summary)[0]) + 1}
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 5 and headings[1:] == [
        "## Skipped questions", "## Acceptance by position", "## From tau to the speed-up", "## How it was measured"
    ]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def tags_of(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_report_html_shows_names_and_answers_as_text(summary):
    page = render("report.html.jinja", summary, [sample()])
    page.encode("utf-8")  # half a surrogate pair cannot be written
    tags = tags_of(page)
    assert not tags.found & {"script", "img", "b[", "iframe"} and not tags.attributes & {"onerror", "src", "href"}
    assert not STEERING.search(page)
    assert tags_of("<p><img src=x onerror=y>").found >= {"img"}  # the parser would see it


def test_comparisons_are_escaped(summary, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        document = {**summary, "settings": {**summary["settings"], "note": f"{name} {EVERYTHING}"}}
        text = json.dumps(document).replace("\\ud800", "")  # half a surrogate pair is no JSON to the reader
        (tmp_path / name / "summary.json").write_text(text)
    report(ReportArgs(paths=(tmp_path / "a", tmp_path / "b"), output=tmp_path / "both.md"))
    text = (tmp_path / "both.md").read_text()
    assert not STEERING.search(text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in rows} == {8}
    assert len(text.splitlines()) == len(rows) + 2  # an empty line and the one setting that differs
    report(ReportArgs(paths=(tmp_path / "a",)))  # its page is drawn again
    assert "script" not in tags_of((tmp_path / "a" / PAGE).read_text()).found


def test_an_ordinary_comparison_is_not_changed(tmp_path):
    write_comparison(tmp_path / "c.md", [["mt_bench", "my-head", "2.10", "1.5 (1.4 to 1.6)", "1", "2", "first"]], {})
    assert "| mt_bench | my-head | 2.10 | 1.5 (1.4 to 1.6) | 1 | 2 | first |" in (tmp_path / "c.md").read_text()


# ---- model cards --------------------------------------------------------------------------------------------------


def test_tables_and_header_of_a_card_are_escaped():
    lines = _table(("", ""), [("data", EVERYTHING)]).splitlines()
    assert len(lines) == 3 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 3
    assert _header("a/b\nevil: 1", "x\nbase_model: somebody/else=l", "eagle3").count("base_model") == 1


@pytest.mark.parametrize("target", ["x; rm -rf ~", "$(reboot)", "a'b", "```\n# x"])
def test_a_command_of_a_card_holds_no_other_command(target):
    assert "vllm serve TARGET --" in _command(LAYOUTS["vllm"].serve, target, "head")
    assert "vllm serve org/Model-1.5B --" in _command(LAYOUTS["vllm"].serve, "org/Model-1.5B", "head")
