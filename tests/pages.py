"""The blocks of README and docs/: which there are, and how each is run. Python blocks run from top to bottom.

Every shell block is preceded by `<!-- run: HOW -->`. yes: executed by test_readme.py on a tiny model; ci: by .ci/run;
engines: by engines/test_walkthrough.py, with vLLM; no (reason): at least its commands and flags must exist.
"""

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOW = ("yes", "ci", "engines", "no")
BLOCK = re.compile(r"<!-- run: (?P<how>\w+)[^>]*-->\s*```bash\n(?P<text>.*?)```", re.S)


def blocks(document: str) -> list[tuple[str, str]]:
    """(how, text) of every shell block, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = [(match["how"], match["text"]) for match in BLOCK.finditer(text)]
    shells = len(re.findall(r"^```(bash|sh|shell|console)\b", text, re.M))
    assert len(found) == shells, f"{document}: a shell block says not how it is run"
    return found


def commands(text: str) -> list[list[str]]:
    """The words of every command of a block; what `fledge serve` hands to vLLM (behind --) is left out, and what starts
    fledge in several processes (`torchrun ... -m fledge`), too."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    found = [words[words.index("fledge") :] if ["-m", "fledge"] in pairs(words) else words for words in found]
    return [words[: words.index("--")] if words[0] == "fledge" and "--" in words else words for words in found]


def pairs(words: list[str]) -> list[list[str]]:
    return [list(pair) for pair in zip(words, words[1:], strict=False)]


def loose_commands(document: str) -> list[str]:
    """Commands in indented blocks, which carry no mark and which nothing would check."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^ {4,}((?:\w+=\S* )*(?:fledge|torchrun|pip|python3?|make|bash|vllm|curl) .*)$", text, re.M)


def mentioned(document: str) -> list[list[str]]:
    """The words of every `fledge ...` inside a sentence."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    return [code.split() for code in re.findall(r"(?<!`)`(fledge [a-z][^`]*)`(?!`)", text)]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run_python(page: Path) -> dict[str, Any]:
    """All Python blocks of a page, in one namespace, which is returned."""
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(python_blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names
