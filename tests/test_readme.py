"""The commands of README and docs/ run, what they list is what is there, and their links lead somewhere.

How a block is run stands before it (pages.py). Blocks marked `yes` are executed here, on a tiny model: the README's
five lines first, then each document's, in order, in a copy of the folder they leave.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import HOW, ROOT, blocks, commands, loose_commands, mentioned
from tiny import TARGETS

from fledge.cli import COMMANDS
from fledge.commands.parser import parse
from fledge.errors import UserError

READMES = ["README.md", "README_zh.md"]
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = [*READMES, *PAGES]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_marked_and_every_command_exists(document):
    for how, text in blocks(document):
        assert how in HOW
        assert how != "engines" or document == "docs/walkthrough.md", "engines/test_walkthrough.py runs that page only"
        for words in commands(text):
            if words[0] == "fledge":
                assert words[1] in COMMANDS, words
            if words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_ci_blocks_are_what_ci_runs(document):
    script = (ROOT / ".ci/run").read_text()
    for how, text in blocks(document):
        if how == "ci":
            assert all(" ".join(words) in script for words in commands(text)), text


@pytest.mark.parametrize("document", READMES)
def test_targets_are_the_test_table(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    listed = text.split("<!-- targets:")[1].split("-->")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(TARGETS)


@pytest.mark.parametrize("chinese", [document for document in DOCUMENTS if document.endswith("_zh.md")])
def test_both_languages_show_the_same_commands(chinese):
    """Comments are translated, commands are not."""
    english = chinese.replace("_zh", "")
    assert [commands(text) for _, text in blocks(chinese)] == [commands(text) for _, text in blocks(english)]


@functools.cache
def help_of(name: str) -> str:
    words = [sys.executable, "-m", "fledge", name, "--help-all"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name):
    text = help_of(name)
    assert len(text.splitlines()) > 8 and "usage" in text.lower()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_flag_exists(document):
    """In blocks, and where a sentence mentions a command."""
    shown = [words for _, text in blocks(document) for words in commands(text) if words[0] == "fledge"]
    for words in [*shown, *mentioned(document)]:
        assert words[1] in COMMANDS, words
        for flag in re.findall(r"(?<=\s)--[\w-]+", " ".join(words).replace("_", "-")):
            known = re.findall(r"--[\w-]+", help_of(words[1]).replace("_", "-"))
            assert flag in known, f"{words[:2]} {flag}"


def parsed(words: list[str]) -> object:
    """The arguments that fledge makes of a command. `words` may end in a redirection."""
    command = COMMANDS[words[1]]
    module = importlib.import_module(command.module)
    flags = list(itertools.takewhile(lambda word: word not in {">", "2>", "|", "&", "&&"}, words[2:]))
    return getattr(module, "parse_args", parse)(getattr(module, command.args), flags, prog="fledge")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_command_is_accepted(document, monkeypatch):
    """Flags and values, of the commands that are not run, too; `...` stands for what was shown before."""
    monkeypatch.chdir(ROOT)  # recipes are named from there
    for _, text in blocks(document):
        for words in commands(text):
            if words[0] == "fledge" and "..." not in words:
                assert parsed(words)


@pytest.mark.parametrize("flags", [("--mode", "plain"), ("--nonsense", "1"), ("--question-end", "x")])
def test_a_command_that_fledge_refuses_would_be_noticed(flags):
    with pytest.raises((SystemExit, UserError)):
        parsed(["fledge", "bench", "--target", "t", *flags])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_stands_outside_a_marked_block(document):
    """Eight of docs/scaling.md did, in indented blocks, so no test looked at their flags."""
    assert loose_commands(document) == []


def test_an_indented_command_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Do:\n\n    torchrun --nproc-per-node 8 -m fledge train\n\n    scripts/   the scripts\n    prompts -> answers\n"
    )
    assert loose_commands(str(page)) == ["torchrun --nproc-per-node 8 -m fledge train"]
    page.write_text("Say `fledge vocab --size 3` or ``fledge``.\n")
    assert mentioned(str(page)) == [["fledge", "vocab", "--size", "3"]]


def run_blocks(document: str, folder: Path, target: Path, path: str) -> subprocess.CompletedProcess:
    """The `yes` blocks of a document in one shell, as a newcomer would type them, with a tiny model as $TARGET."""
    environment = {
        **os.environ, "TARGET": str(target), "PROMPTS": "prompts.jsonl", "FLEDGE_CACHE": str(folder / "cache"),
        "FLEDGE": str(ROOT), "PATH": path,
    }  # fmt: skip
    script = "\n".join(text for how, text in blocks(document) if how == "yes")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def worked(tmp_path_factory, tiny_model_dir, warm_path) -> tuple[Path, str]:
    """The folder in which the README's five lines were typed, and what they printed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"id": "p{n}", "messages": [{{"role": "user", "content": "say {n} words"}}]}}\n' for n in range(24))
    )
    done = run_blocks("README.md", folder, tiny_model_dir, warm_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr + done.stdout


def test_the_five_lines_run(worked):
    folder, printed = worked
    assert (folder / "head" / "model.safetensors").is_file() and (folder / "head" / "provenance.json").is_file()
    assert "tau" in printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(how == "yes" for how, _ in blocks(page))])
def test_the_blocks_of_a_page_run(page, worked, tiny_model_dir, tmp_path, warm_path):
    shutil.copytree(worked[0], tmp_path / "work")
    done = run_blocks(page, tmp_path / "work", tiny_model_dir, warm_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_command_that_fails_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "blocks", lambda document: [("yes", "true\nfalse\ntrue\n")])
    assert run_blocks("README.md", tmp_path, tmp_path, os.environ["PATH"]).returncode == 1


# ---- links and pages -------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)]*))?\)")


def dead_links(document: Path) -> list[str]:
    """Relative links of a markdown file that lead to no file, or to no heading of one."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    dead = []
    for match in LINK.finditer(text):
        target = document.parent / match["path"] if match["path"] else document
        if not target.exists():
            dead.append(match[0])
        elif match["anchor"] and match["anchor"] not in anchors(target):
            dead.append(match[0])
    return dead


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    assert not dead_links(ROOT / document)


def test_a_dead_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n\n[a](page.md#a-heading) [b](page.md#b) [c](other.md) [d](https://x.org)\n")
    assert dead_links(page) == ["[b](page.md#b)", "[c](other.md)"]


def test_every_page_is_reached():
    """In the navigation of mkdocs.yml, and no page there that is not in docs/."""
    navigation = re.findall(r"^ +- .*?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(navigation) == sorted(Path(page).name for page in PAGES), "list each page of docs/ in mkdocs.yml"


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs pip install -e '.[docs]'")
def test_the_documentation_builds_strictly(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    assert (tmp_path / "site" / "train-a-head" / "index.html").is_file()
    found = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    for word, page in (("near-tie", "reading-a-report/"), ("起草", "serve-it_zh/")):  # the search finds both languages
        assert any(word in one["text"] and one["location"].startswith(page) for one in found["docs"])
    words = re.split(found["config"]["separator"], "起草 near-tie")
    assert [word for word in words if word] == ["起", "草", "near", "tie"]
