"""The seeded part of the fuzzing: the same cases every time, in all areas, in less than a minute.

`make fuzz` draws more of them. A failure lists each kind of fault with the input that showed it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fledge.errors import UserError
from fuzz.areas import AREAS, cases_of, shares
from fuzz.documents import BROKEN_TEXT
from fuzz.harness import BAD, LIMIT_BYTES, Case, Tally, WrongValue, judge, run_cases

CASES = 800


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Tokenised data goes to a folder of this run; syncing to the disk is what makes small files slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.mark.parametrize("area", AREAS)
def test_every_input_is_read_right_or_refused_with_one_line(area):
    tally = Tally()
    run_cases(cases_of(area), shares(CASES, list(AREAS))[area], tally)
    assert not tally.faults, "\n".join(fault.line() for fault in tally.faults.values())
    (name,) = tally.areas
    assert tally.count(name, "accepted", valid=True) and tally.count(name, "refused", valid=False)


def refuse(_: Path) -> None:
    raise UserError("no")


def misread(_: Path) -> None:
    raise WrongValue("5, not 6")


ENDS = {
    "accepted": Case("x", None, lambda folder: None),
    "refused": Case("x", "broken", refuse),
    "accepted though wrong": Case("x", "broken", lambda folder: None),
    "refused though right": Case("x", None, refuse),
    "wrong value": Case("x", None, misread),
    "traceback": Case("x", "broken", lambda folder: {}["absent"]),
    "hang": Case("x", None, lambda folder: time.sleep(60)),
    "memory": Case("x", None, lambda folder: bytearray(LIMIT_BYTES + (64 << 20))),
}


@pytest.mark.parametrize("outcome", ENDS)
def test_every_outcome_is_told_apart(outcome, tmp_path):
    """Negative control: a harness that could not fail would find every reader faultless."""
    patience_s = 1.0 if outcome == "hang" else 30.0  # a machine short of memory takes seconds to hand out a gigabyte
    assert judge(ENDS[outcome], tmp_path, limit_s=patience_s).outcome == outcome


def test_every_bad_outcome_is_a_fault():
    tally = Tally()
    for outcome in set(BAD) - {"hang"}:
        tally.record(ENDS[outcome])
    assert {fault.outcome for fault in tally.faults.values()} == set(BAD) - {"hang"}
    tally.record(ENDS["accepted"])
    assert len(tally.faults) == len(BAD) - 1


@pytest.mark.parametrize("rule", BROKEN_TEXT)
def test_broken_text_is_no_sound_object(rule):
    """The labels of the generic rules hold: no strict JSON parser takes what they make for an object."""
    import msgspec

    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError, RecursionError)):
        msgspec.json.decode(BROKEN_TEXT[rule](b'{"a": "x", "b": "y"}'), type=dict[str, str])


COMMAND_LINES: dict[str, list[str | bytes]] = {
    "unknown flag": ["train", "--no-such-flag", "1"],
    "wrong number": ["plan", "--target-model-name-or-path", "target", "--num-tokens", "many"],
    "no such data": ["regenerate", "--data-name-or-path", "./absent.jsonl", "--output-dir", "out"],
    "a name that is not UTF-8": ["regenerate", "--data-name-or-path", b"./\xff.jsonl", "--output-dir", "out"],
    "no such command": ["nonsense"],
    "no such recipe": ["bench", "--target", "x", "--config", "absent.yaml"],
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_the_real_command_line_ends_without_a_traceback(case, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fledge", *COMMAND_LINES[case]], cwd=tmp_path, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode in (1, 2) and b"Traceback" not in done.stderr and done.stderr.strip()
    assert not list(tmp_path.iterdir())
