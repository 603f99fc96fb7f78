"""The doctor finds each known disease, and nothing on a healthy head."""

import dataclasses

import pytest
from tiny import tiny_config, tiny_draft, tiny_target

from fledge.draft.checkpoint import save_draft
from fledge.errors import UserError
from fledge.export.check import findings, inspect_head
from fledge.inspect import InspectArgs

DISEASES = {
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "max_position_embeddings": {"max_position_embeddings": 64},
    "layer \\*outputs\\*": {"tap_layers": (1, 3, 4)},
    "tap layers \\[2, 4, 9\\]": {"tap_layers": (2, 4, 9)},
    "vocab_size": {"vocab_size": 256},
    "head_dim": {"head_dim": 8},
    "fc_norm=True but norm_output=False": {"fc_norm": True},
}


def test_a_healthy_head_has_no_findings():
    target = tiny_target("llama")
    assert findings(tiny_config(target), target.text_config) == []


@pytest.mark.parametrize("what", DISEASES)
def test_each_disease_is_found(what):
    target = tiny_target("llama")
    sick = dataclasses.replace(tiny_config(target), **DISEASES[what])
    import re

    assert any(re.search(what, finding.what) for finding in findings(sick, target.text_config))


def test_the_command_ends_with_an_error(tmp_path):
    target = tiny_target("llama")
    draft = tiny_draft(target)
    save_draft(draft, tmp_path / "head")
    target.model.config.save_pretrained(tmp_path / "target")
    args = InspectArgs(path=str(tmp_path / "head"), target=str(tmp_path / "target"))
    inspect_head(args)
    draft.config = dataclasses.replace(draft.config, tap_layers=(1, 3, 4))
    save_draft(draft, tmp_path / "head")
    with pytest.raises(UserError, match="does not fit.*outputs"):
        inspect_head(args)
