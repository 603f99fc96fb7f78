"""A target that learned to look at pictures, and a head that learned from it: benchmarks/learned_pictures.py, smaller.

Random weights answer anything; here captions are right only if the picture was seen, so a head that drafts them well,
on pictures neither has seen, drafts from what the target saw.
"""

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODULES = ("learned_pictures", "looking_target", "drawn_pictures")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import learned_pictures

    yield learned_pictures
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_head_for_a_target_that_looks(benchmark, tmp_path, monkeypatch, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("a minute or two: `pytest -m slow tests/e2e/test_learned_pictures.py`")
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    task = benchmark.Task(grid=3, colours=4, digits=5)
    school = benchmark.Schooling(steps=240, batch=16, pictures=4096)
    found = benchmark.learn(
        tmp_path, task, school, answered=range(200_000, 200_192), asked=range(300_000, 300_016), head_epochs=6
    )
    asked = found["questions"]
    assert found["right_captions"] >= 0.7 * found["unseen_pictures"], "the target does not look"
    assert found["right_for_another_picture"] <= 0.05 * found["unseen_pictures"], "the control: captions are all alike"
    assert found["tau_tree"] >= 2.5 and found["identical_tree"] == found["identical_chain"] == asked
    assert found["tau_chain"] > found["tau_chain_of_the_blind"] + 0.3, "the head drafts what can be said unseen"
    assert found["changed_by_noise"] >= 0.9 * asked and found["identical_over_noise"] == asked


def test_the_blind_drafter_as_drawn(benchmark):
    """Fixed words come in runs, the word that needs eyes ends each round."""
    known = [["a", "red", "box", "."], ["a", "red", "box", "."], ["a", "blue", "box", "."]]
    assert benchmark.blind_tau(known, [["a", "red", "box", "."]], 4) == 4
    assert benchmark.blind_tau(known, [["a", "blue", "box", "."]], 4) == 2
    assert benchmark.blind_tau(known, [["a", "red", "box", "."]], 1) == 2
