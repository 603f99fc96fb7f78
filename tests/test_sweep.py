"""What docs/targets.md says of an architecture is what fledge does with it. Fast rows here, all in `make sweep`."""

import re

import pytest
from sweep import FAST, NAMES, line, outcome, rows_of_page

SLOW = [name for name in NAMES if name not in FAST]


def said(row: str) -> str:
    """A row without the sizes of errors, which depend on the machine."""
    return re.sub(r"\d+%", "some %", row)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.sweep) for name in SLOW)])
def test_the_page_says_what_happens(name):
    assert said(rows_of_page()[name]) == said(line(name, outcome(name))), "run `python tests/sweep.py`"


def test_the_page_has_every_architecture():
    assert sorted(rows_of_page()) == sorted(NAMES)
