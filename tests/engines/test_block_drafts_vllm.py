"""A DFlash export in a real vLLM server, judged against our own decoding: texts, and acceptance by position.

vLLM's CPU build runs DFlash by its older runner. DSpark is for the newer one, which needs a GPU: what the older one
says to it is shown here, and what the newer one reads in tests/export/test_block_engines.py.
"""

import dataclasses
import json

import pytest
from block_reference import lively
from vllm_chains import NEAR_TIE, Reference, deviation, same_rounds, served, serving

from fledge.drafters.dspark.checkpoint import read_block
from fledge.drafters.dspark.config import derive_block, to_json
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.head_files import save_draft
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reference(smollm2_dir, trained_block) -> Reference:
    return Reference(smollm2_dir, read_block(trained_block).config.tap_layers)


@pytest.mark.parametrize(("layout", "length"), [("vllm", 7), ("vllm", 3), ("speculators", 7)])
def test_vllm_drafts_as_we_do(layout, length, vllm_program, trained_block, reference, tmp_path, capsys):
    exported = tmp_path / "draft"
    export_head(ExportSettings(head=str(trained_block), to=layout, output_dir=exported, target=str(reference.dir)))
    answers, theirs = served(vllm_program, exported, length, reference, tmp_path)
    for prompt, answer, ours in zip(reference.prompts, answers, reference.answers, strict=True):
        assert answer == ours or reference.gap(prompt, ours, answer) < NEAR_TIE
    with capsys.disabled():
        title = f"DFlash, {layout} layout, chain of {length}"
        same_rounds(reference.chain(trained_block, length), theirs, title, least=0.03)  # from scratch, on 64 answers


def test_the_comparison_sees_another_layout(trained_block, reference, tmp_path, capsys):
    """Negative control: the same weights read one slot off are another draft."""
    config = dataclasses.replace(read_block(trained_block).config, sample_from_anchor=True)
    for path in trained_block.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    right, wrong = reference.chain(trained_block, 7), reference.chain(tmp_path, 7)
    with capsys.disabled():
        print(f"\nread one slot off: position 1 {wrong.at(0):.4f} instead of {right.at(0):.4f}")
    assert max(deviation(right, wrong, position) for position in range(3)) > 3


def test_dspark_needs_the_newer_runner(vllm_program, reference, tmp_path):
    """A DSpark export reaches vLLM's own choice of a drafter, and there it ends without a GPU."""
    target = reference.target
    config = derive_block(
        target.text_config, "dspark", vocab_size=target.vocab_size, tap_layers=target.tap_layers, mask_token_id=5,
        draft_vocab_size=64, overrides={"num_layers": 1, "markov_rank": 8},
    )  # fmt: skip
    save_draft(lively(BlockDraft(config, target.embedding_weight, target.head_weight)), tmp_path / "draft")
    flags = ("--draft", str(tmp_path / "draft"), "--num-speculative-tokens", "7")
    with pytest.raises(AssertionError, match="does not support: dspark speculative decoding"):
        with serving(vllm_program, reference.dir, tmp_path, *flags):
            pass
