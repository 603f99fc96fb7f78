"""The README's commands run, and what it lists is what is there.

Every shell block is preceded by `<!-- run: yes -->` (executed here, on a tiny model), `<!-- run: ci -->` (executed by
.ci/run) or `<!-- run: no (reason) -->`; of the last kind at least the commands and their flags must exist.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TARGETS

from fledge.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "README_zh.md"]
BLOCK = re.compile(r"<!-- run: (?P<how>\w+)[^>]*-->\s*```bash\n(?P<text>.*?)```", re.S)


def blocks(document: str) -> list[tuple[str, str]]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = [(match["how"], match["text"]) for match in BLOCK.finditer(text)]
    assert len(found) == text.count("```bash"), f"{document}: a shell block says not how it is run"
    return found


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_marked_and_every_command_exists(document):
    for how, text in blocks(document):
        assert how in ("yes", "ci", "no")
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_are_the_test_table(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    listed = text.split("<!-- targets:")[1].split("-->")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(TARGETS)


@functools.cache
def help_of(name: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fledge", name, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name):
    text = help_of(name)
    assert len(text.splitlines()) > 10 and "usage" in text.lower()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_flag_exists(document):
    for _, text in blocks(document):
        for words in commands(text):
            if words[0] != "fledge":
                continue
            for flag in (word for word in words if word.startswith("--")):
                known = re.findall(r"--[\w-]+", help_of(words[1]).replace("_", "-"))
                assert flag.replace("_", "-") in known, f"{words[:2]} {flag}"


def test_the_five_lines_run(tmp_path, tiny_model_dir):
    """As a newcomer would type them, with a tiny model as $TARGET."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "p{n}", "messages": [{{"role": "user", "content": "say {n} words"}}]}}\n'
                               for n in range(24)))  # fmt: skip
    environment = {**os.environ, "TARGET": str(tiny_model_dir), "PROMPTS": str(prompts), "FLEDGE_CACHE": str(tmp_path),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    (script,) = [text for how, text in blocks("README.md") if how == "yes"]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "head" / "model.safetensors").is_file() and (tmp_path / "head" / "provenance.json").is_file()
    assert "tau" in done.stderr + done.stdout
