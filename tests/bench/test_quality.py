"""Scores and the comparison of outputs."""

import pytest

from fledge.bench.quality import code_of, compare_outputs, first_difference, last_number, same_boxed, score_answer
from fledge.bench.questions import Question
from fledge.data.samples import Prompt


class Asked:
    """An engine that says which prefix it was asked about."""

    def __init__(self, gap, noise=0.02, behind=None):
        self.answer = {"gap": gap, "behind": gap if behind is None else behind, "noise": noise}

    def top2(self, prompt, token_ids, chosen):
        self.prefix, self.chosen = prompt.ids + token_ids, chosen
        return self.answer

    def mean_log_likelihood(self, prompt, token_ids):
        return -float(len(token_ids))


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_a_difference_at_a_near_tie_is_explained_by_rounding():
    engine = Asked(gap=0.03)
    check = compare_outputs(engine, Prompt([1]), {"baseline": [4, 5, 7], "eagle": [4, 6, 7]}, greedy=True)
    assert engine.prefix == [1, 4] and engine.chosen == [5, 6]
    assert check["tie"] and (check["position"], check["gap"], check["noise"]) == (1, 0.03, 0.02)


@pytest.mark.parametrize(("gap", "behind"), [(0.5, None), (0.03, 0.5)])
def test_a_difference_at_a_clear_favourite_or_another_token_is_not(gap, behind):
    check = compare_outputs(Asked(gap, behind=behind), Prompt([1]), {"baseline": [4, 5], "eagle": [4, 6]}, greedy=True)
    assert not check["tie"]


def test_sampled_outputs_are_compared_by_likelihood():
    check = compare_outputs(Asked(0.0), Prompt([1]), {"baseline": [4, 5], "eagle": [4]}, greedy=False)
    assert check == {"baseline_log_likelihood": -2.0, "eagle_log_likelihood": -1.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 12 + 30 = 42.", 42), ("about $1,234.50 in all", 1234.5), ("it is -3", -3), ("none", None), ("#### 99", 99)],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_gsm8k_and_math_scores():
    question = Question("gsm8k", "0", "", ("?",), reference=("7+3=<<7+3=10>>10\n#### 10",))
    assert score_answer(question, "The answer is 10.", run_code=None) is True
    assert score_answer(question, "The answer is 10, no, 11.", run_code=None) is False
    assert same_boxed(r"so \boxed{\frac{1}{2}}.", r"$\dfrac{1}{2}$")
    assert not same_boxed(r"so \boxed{3}", "4") and not same_boxed("3", "3")


def test_sets_without_an_answer_have_no_score():
    assert score_answer(Question("mt_bench", "0", "", ("?",), reference=("x",)), "x", run_code=None) is None


CHECK = {
    "prompt": "from typing import List\n\n\ndef double(x: int) -> int:\n    '''Twice x.'''\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}
HUMANEVAL = Question("humaneval", "0", "code", ("?",), code_check=CHECK)


def test_code_runs_only_when_asked():
    assert score_answer(HUMANEVAL, "    return 2 * x\n", run_code=None) is None
    assert score_answer(HUMANEVAL, "    return 2 * x\n", run_code="none") is True
    assert score_answer(HUMANEVAL, "    return 3 * x\n", run_code="none") is False


def test_code_is_found_in_a_fenced_block():
    answer = "Sure!\n```python\ndef double(x):\n    return x + x\n```\nDone."
    assert code_of(answer, CHECK["prompt"]).startswith("from typing import List")
    assert score_answer(HUMANEVAL, answer, run_code="none") is True
