"""The log of experiments: its index names every entry, and an entry that code or documents cite exists.

Entries moved to another file left references to a heading that was nowhere.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "dev" / "log"
CITING = ("fledge", "docs", "configs", "benchmarks")
CITED = re.compile(r'dev/log(?:/[\w-]+\.md)?, "([^"]+)"')


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def entries() -> dict[str, str]:
    """Link of every entry -> its title, without the date."""
    return {
        f"{month.name}#{anchor(heading)}": heading[11:]
        for month in LOG.glob("20*.md")
        for heading in re.findall(r"^## (.+)$", month.read_text(encoding="utf-8"), re.M)
    }


def unknown(cited: set[str]) -> set[str]:
    """Of these titles, those that are neither an entry nor a point in bold within one."""
    text = "".join(month.read_text(encoding="utf-8") for month in LOG.glob("20*.md"))
    points = re.findall(r"^- \*\*([^*]+?)\.?\*\*", text, re.M)
    return cited - set(entries().values()) - set(points)


def test_the_index_links_every_entry_and_nothing_else():
    index = (LOG / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\((20[\w-]+\.md#[^)]+)\)", index))
    assert linked == set(entries())


def test_cited_entries_exist():
    files = [file for folder in CITING for kind in ("py", "md", "yaml") for file in (ROOT / folder).rglob(f"*.{kind}")]
    texts = [re.sub(r"\s*\n\s*#?\s*", " ", file.read_text(encoding="utf-8")) for file in files]
    cited = {title for text in texts for title in CITED.findall(text)}
    assert len(cited) >= 5 and not unknown(cited)
    assert unknown({"An entry that is not there"})  # control
