"""Heads with a multimodal rope through every layout: the rope comes back as it went, and a wrong one is named."""

import dataclasses

import pytest
import torch
from tiny import tiny_draft
from tiny_vlm import MULTIMODAL_ROPE, tiny_vlm

from fledge.doctor.check import findings
from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.drafters.eagle3.head import read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.errors import UserError
from fledge.export.convert import convert_head, export_head
from fledge.export.layouts import LAYOUTS
from fledge.export.settings import ConvertSettings, ExportSettings


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_every_layout_keeps_the_rope(name, layout, tmp_path):
    target = tiny_vlm(name)
    save_draft(draft := tiny_draft(target), tmp_path / "head", dtype=torch.float32)
    settings = ExportSettings(head=str(tmp_path / "head"), to=layout, output_dir=tmp_path / "out", target="T")
    if layout == "llama.cpp" and "partial_rotary_factor" in draft.config.rope_parameters:
        with pytest.raises(UserError, match="partial_rotary_factor of 0.5"):
            export_head(settings)
        return
    export_head(settings)
    convert_head(ConvertSettings(head=str(tmp_path / "out"), output_dir=tmp_path / "back"))
    after = read_head(tmp_path / "back").config
    assert after.rope_parameters == draft.config.rope_parameters
    again = DraftModel(after, target.embedding_weight)
    positions = torch.randint(0, 200, (target.rope_axes, 9))
    assert all(torch.equal(a, b) for a, b in zip(again.rope(positions), draft.rope(positions), strict=True))


def test_the_doctor_names_another_layout():
    target = tiny_vlm("qwen3_vl")
    config = tiny_draft(target).config
    assert not [found for found in findings(config, target.text_config) if "multimodal" in found.what]
    for change, words in (({"mrope_interleaved": False}, "is chunked [4, 2, 2]"), ({"mrope_section": None}, "is none")):
        wrong = dataclasses.replace(config, rope_parameters={**config.rope_parameters, **change})
        found = [one.what for one in findings(wrong, target.text_config) if "multimodal" in one.what]
        assert found == [f"multimodal rope {words}, the target's is interleaved [4, 2, 2]"]
