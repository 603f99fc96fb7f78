"""Is the speculative side's answer as good as the plain side's?

T = 0: both are the argmax path, so the outputs are equal; in 16-bit arithmetic a near-tie may tip the other way. Then
the distance of both sides' tokens from the best logit at the first difference is held against the rounding of this very
text: how far gaps move at its last tokens when the target reads them in one pass or one by one.
T > 0: outputs differ by design; their mean log-likelihood under the target must not. Where a set has references, task
scores of both sides. Knows texts, token ids and an engine to ask.
"""

import re
from collections.abc import Callable
from typing import Any

from fledge.bench.questions import Question
from fledge.bench.sandbox import Isolation, passes_tests
from fledge.data.samples import Prompt

TIE_NOISE = 2.0  # both sides round, each as far as the largest move seen between two ways to read the text


def compare_outputs(engine: Any, prompt: Prompt, outputs: dict[str, list[int]], *, greedy: bool) -> dict:
    """The quality check of one turn; `outputs` maps each side to its token ids."""
    if not greedy:
        return {
            f"{side}_log_likelihood": engine.mean_log_likelihood(prompt, token_ids)
            for side, token_ids in outputs.items()
        }
    if len(outputs) < 2:
        return {}
    one, other = outputs.values()
    position = first_difference(one, other)
    if position is None:
        return {"identical": True}
    chosen = [ids[position] for ids in (one, other) if position < len(ids)]
    top = engine.top2(prompt, one[:position], chosen)
    return {
        "identical": False, "position": position, **top, "tie": top["behind"] <= TIE_NOISE * top["noise"],
    }  # fmt: skip


def first_difference(one: list[int], other: list[int]) -> int | None:
    """The first position where two outputs differ (the shorter one's length when it is a prefix); None when equal."""
    for position, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def score_answer(question: Question, answer: str, *, run_code: Isolation | None) -> bool | None:
    """Whether an answer is right; None where the set has nothing to say. `run_code` None: code is not run."""
    if question.dataset == "humaneval":
        check = question.code_check
        if run_code is None or check is None:
            return None
        return passes_tests(code_of(answer, check["prompt"]), check, isolation=run_code)
    if not question.reference:
        return None
    scorer = SCORERS.get(question.dataset)
    return scorer(answer, question.reference[0]) if scorer else None


def same_number(answer: str, reference: str) -> bool:
    """gsm8k: the last number of the answer equals the last number of the reference (`#### 42`)."""
    found, wanted = last_number(answer), last_number(reference)
    return found is not None and found == wanted


def last_number(text: str) -> float | None:
    """The last number in a text; `1,234.50` is one number and a sentence's full stop is none of it."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def same_boxed(answer: str, reference: str) -> bool:
    r"""math500: the content of the last \boxed{...} equals the reference, spacing and dollar signs aside."""
    start = answer.rfind("\\boxed{")
    if start < 0:
        return False
    depth, begin = 0, start + len("\\boxed")
    for index in range(begin, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[index], 0)
        if depth == 0:
            return _plain_math(answer[begin + 1 : index]) == _plain_math(reference)
    return False


def same_letter(answer: str, reference: str) -> bool:
    """mmmu, mmstar: the choice an answer names, `B`, `(B)` or `the answer is B`; of several the last."""
    letters = re.findall(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'])", answer)
    return bool(letters) and letters[-1] == reference.strip().upper()


def same_words(answer: str, reference: str) -> bool:
    """textvqa: the answer most people gave stands in this one."""
    return reference.strip().lower() in answer.lower()


def code_of(answer: str, prompt: str) -> str:
    """The program in an answer: its first fenced block, else the text; the prompt goes before a bare function body."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, flags=re.DOTALL | re.IGNORECASE)
    code = fenced.group(1) if fenced else answer
    imports = prompt[: prompt.find("def ")]
    return imports + code if re.search(r"^(?:async )?def ", code, flags=re.MULTILINE) else prompt + code


def _plain_math(text: str) -> str:
    text = re.sub(r"\\(left|right|!|,|;|\s)|\$|\s", "", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".")


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "gsm8k": same_number,
    "math500": same_boxed,
    "quick": same_number,
    "mmmu": same_letter,
    "mmstar": same_letter,
    "textvqa": same_words,
}
