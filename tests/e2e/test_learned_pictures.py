"""A target that learned to look at pictures, and a head that learned from it: benchmarks/learned_pictures.py.

Random weights answer anything; here captions are right only if the picture was seen, so a head that drafts them well,
on pictures neither has seen, drafts from what the target saw.
"""

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_head_for_a_target_that_looks(tmp_path, monkeypatch, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("six minutes of two cores: `pytest -m slow tests/e2e`")
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from learned_pictures import STEPS, learn

    try:
        found = learn(tmp_path, steps=STEPS, head_epochs=8)
    finally:
        for name in ("learned_pictures", "drawn_pictures"):
            sys.modules.pop(name, None)
    asked = found["questions"]
    assert found["right_captions"] >= 0.6 * asked, "the target does not look"
    assert found["tau_tree"] >= 2.5 and found["identical_tree"] == found["identical_chain"] == asked
    assert found["changed_by_noise"] >= 0.9 * asked and found["identical_over_noise"] == asked
