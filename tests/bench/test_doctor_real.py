"""The doctor at a real target: SmolLM2 and a trained head, exported with the faults known from the wild.

Needs FLEDGE_TEST_HEAD, a head for SmolLM2-135M-Instruct trained well enough to have something to lose (a greedy chain
of 4 keeps 1.3 tokens per forward or more).
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from fledge.bench.prompts import load_questions
from fledge.data.tokenize import ChatTemplate
from fledge.doctor.inspect_head import measured_findings
from fledge.doctor.readings import Diagnosis, RecordedAnswers, diagnose, layers_to_tap
from fledge.drafters.eagle3.head import Head, read_head
from fledge.target.model import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS, TOKENS = 12, 64


@pytest.fixture(scope="module")
def head() -> Head:
    folder = os.environ.get("FLEDGE_TEST_HEAD")
    if not folder:
        pytest.skip("needs FLEDGE_TEST_HEAD, a trained head for SmolLM2-135M-Instruct")
    return read_head(Path(folder))


@pytest.fixture(scope="module")
def bedside(head, smollm2_dir) -> tuple[Target, list[list[int]]]:
    target = Target.from_pretrained(str(smollm2_dir), dtype=torch.float32, tap_layers=layers_to_tap(head.config, 30))
    template = ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids)
    questions = load_questions("quick", end=PROMPTS)
    return target, [template.prompt_ids([{"role": "user", "content": q.turns[0]}]) for q in questions]


@pytest.fixture(scope="module")
def answered(bedside):
    """The target's answers, once for all cases: they do not depend on the head."""
    with pytest.MonkeyPatch.context() as patch:
        target, prompts = bedside
        recorded = RecordedAnswers(target, prompts, TOKENS)
        patch.setattr("fledge.doctor.readings.RecordedAnswers", lambda *_: recorded)
        yield target, prompts


def run(answered, head: Head, **changes) -> Diagnosis:
    ill = dataclasses.replace(head, config=dataclasses.replace(head.config, **changes))
    target, prompts = answered
    return diagnose(target, ill, prompts, max_new_tokens=TOKENS)


def show(capsys, name: str, found: Diagnosis) -> None:
    with capsys.disabled():
        print(f"\n{name}: tau {found.stated.tau:.3f} as stated, {found.best.tau:.3f} as diagnosed; "
              f"{found.positions} positions, {found.seconds:.0f} s")  # fmt: skip
        for score in found.scores:
            (drafts, spread), (gain, error) = score.drafts_over(found.stated), score.gain_over(found.stated)
            print(f"  {score.reading.label:32s} tau {score.tau:.3f}  drafts {drafts:+.4f} +- {spread:.4f}"
                  f"  nats {gain:+.4f} +- {error:.4f}")  # fmt: skip


def test_the_head_as_it_is(answered, head, capsys):
    found = run(answered, head)
    show(capsys, "as trained", found)
    assert found.best is found.stated and found.stated.tau > 1.2


def test_exported_at_another_rope_base(answered, head, capsys):
    """Files that agree with themselves; only decoding tells. A base a decade off cannot be told on texts this short."""
    found = run(answered, head, rope_parameters={"rope_type": "default", "rope_theta": 1e3})
    show(capsys, "exported at rope base 1000", found)
    assert found.best.reading.topic == "rope" and found.best.reading.config.rope_parameters["rope_theta"] >= 1e4
    assert [finding.topic for finding in measured_findings(found)] == ["rope"]


def test_exported_with_outputs_for_inputs(answered, head, capsys):
    found = run(answered, head, tap_layers=tuple(layer - 1 for layer in head.config.tap_layers))
    show(capsys, "outputs of layers read as inputs", found)
    assert found.best.reading.config == head.config


def test_another_vocabulary_that_agrees_with_itself(answered, head, capsys):
    """d2t and t2d of another head, both: consistent files, and not a word right."""
    target, prompts = answered
    size = head.config.draft_vocab_size
    other = torch.arange(size) + (head.config.vocab_size - size) - torch.arange(size)
    wrong = Head(head.config, head.tensors | {"d2t": other})
    found = diagnose(target, wrong, prompts, max_new_tokens=TOKENS)
    show(capsys, "another head's vocabulary", found)
    assert any("under every reading" in finding.what for finding in measured_findings(found))
    assert torch.equal(found.stated.reading.d2t, other)
