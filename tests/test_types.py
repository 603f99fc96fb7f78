"""What `mypy` checks where: everything in the package; in the tests the names, attributes and calls."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
WRONG_TYPE = "len(3)\n"


def checked(folder: Path) -> set[tuple[str, str]]:
    """(file:line, kind) of what mypy finds in a folder, with this project's settings."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(PROJECT), "--cache-dir", str(folder / "cache"), "."]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    lines = [line.split(": error: ") for line in found.stdout.splitlines() if ": error: " in line]
    assert lines or "Success" in found.stdout, found.stdout + found.stderr
    return {(place, message.rpartition("[")[2].rstrip("]")) for place, message in lines}


def test_a_name_that_a_test_still_uses_is_found(tmp_path):
    """A class was renamed, a test went on importing it, and only the whole suite showed it."""
    pytest.importorskip("mypy")
    (tmp_path / "fledge").mkdir()
    (tmp_path / "fledge" / "made.py").write_text(f"class New:\n    def act(self) -> None: ...\n\n\n{WRONG_TYPE}")
    (tmp_path / "test_made.py").write_text(
        f"from fledge.made import New\nfrom fledge.made import Old\nNew().acts()\nNew(1)\n{WRONG_TYPE}"
    )
    assert checked(tmp_path) == {
        ("fledge/made.py:5", "arg-type"), ("test_made.py:2", "attr-defined"), ("test_made.py:3", "attr-defined"),
        ("test_made.py:4", "call-arg"),
    }  # fmt: skip
    (tmp_path / "fledge" / "made.py").write_text("class New:\n    def act(self) -> None: ...\n")
    (tmp_path / "test_made.py").write_text(f"from fledge.made import New\nNew().act()\n{WRONG_TYPE}")
    assert checked(tmp_path) == set()
