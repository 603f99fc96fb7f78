"""Heads in a real vLLM server, judged against our own decoding: texts, and acceptance by position (vllm_chains.py)."""

import dataclasses
import json
import shutil

import pytest
from vllm_chains import NEAR_TIE, Reference, complete, deviation, same_rounds, served, serving

from fledge.drafters.eagle3.config import from_json, to_json
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
CASES = [
    ("eagle3", "vllm", 1), ("eagle3", "vllm", 3), ("eagle3", "vllm", 5), ("eagle3", "speculators", 3),
    ("eagle3.1", "vllm", 1), ("eagle3.1", "vllm", 3), ("eagle3.1", "vllm", 5), ("eagle3.1", "speculators", 3),
    ("two layers", "vllm", 3), ("two layers", "speculators", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(smollm2_dir) -> Reference:
    return Reference(smollm2_dir)


@pytest.fixture(scope="module")
def plain_answers(vllm_program, reference, tmp_path_factory) -> list[list[int]]:
    """vLLM's own greedy answers, without a head."""
    with serving(vllm_program, reference.dir, tmp_path_factory.mktemp("plain")) as url:
        return [complete(url, prompt) for prompt in reference.prompts]


@pytest.mark.parametrize(("kind", "layout", "length"), CASES, ids=lambda value: str(value))
def test_vllm_drafts_as_we_do(
    kind, layout, length, vllm_program, trained_heads, reference, plain_answers, tmp_path, capsys
):
    exported = tmp_path / "head"
    export_head(
        ExportSettings(head=str(trained_heads[kind]), to=layout, output_dir=exported, target=str(reference.dir))
    )
    answers, theirs = served(vllm_program, exported, length, reference, tmp_path)
    for prompt, answer, plain, ours in zip(
        reference.prompts, answers, plain_answers, reference.answers, strict=True
    ):  # lossless: with the head, without it, and in our own decoding
        assert answer == plain or reference.gap(prompt, plain, answer) < NEAR_TIE
        assert ours == plain or reference.gap(prompt, plain, ours) < NEAR_TIE
    with capsys.disabled():
        same_rounds(reference.chain(trained_heads[kind], length), theirs, f"{kind}, {layout} layout, chain of {length}")


def test_the_comparison_sees_another_network(trained_heads, reference, tmp_path, capsys):
    """Negative control: the same weights with the other residual (what SGLang does to such a head) fail by far.

    Taps one layer off would not do: neighbouring layers of this small target say nearly the same (dev/log).
    """
    head = trained_heads["eagle3"]
    config = dataclasses.replace(from_json(head / "config.json"), norm_before_residual=True)
    shutil.copytree(head, tmp_path / "wrong", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(to_json(config)))
    right, wrong = reference.chain(head, 3), reference.chain(tmp_path / "wrong", 3)
    with capsys.disabled():
        print(f"\nthe other residual: position 1 {wrong.at(0):.4f} instead of {right.at(0):.4f}")
    assert deviation(right, wrong, 0) > 3
