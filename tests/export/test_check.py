"""The doctor's reading room: each known disease is found and named, a healthy head has none."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_draft, tiny_target

from fledge.doctor.check import examine, findings
from fledge.doctor.repair import repaired
from fledge.drafters.eagle3.checkpoint import WEIGHTS, save_draft
from fledge.drafters.eagle3.head import check_head, read_head
from fledge.errors import UserError

DISEASES = {
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "rotates 8 dimensions of a head instead of 16": {
        "rope_parameters": {**tiny_config(tiny_target("llama")).rope_parameters, "partial_rotary_factor": 0.5}
    },
    "max_position_embeddings": {"max_position_embeddings": 64},
    "layer \\*outputs\\*": {"tap_layers": (1, 3, 4)},
    "tap layers \\[2, 4, 9\\]": {"tap_layers": (2, 4, 9), "target_layers": None},
    "not the usual": {"tap_layers": (2, 4, 6)},
    "vocab_size": {"vocab_size": 256},
    "head_dim": {"head_dim": 8},
    "fc_norm=True but norm_output=False": {"fc_norm": True},
    "SGLang ignores it|norm_before_residual": {"norm_before_residual": True},
}


def test_a_healthy_head_has_no_findings(head_dir):
    target = tiny_target("llama")
    assert findings(tiny_config(target), target.text_config) == []
    seen = examine(head_dir, target.text_config)
    assert seen.findings == [] and seen.vocabularies == {} and seen.origin == "fledge"


@pytest.mark.parametrize("what", DISEASES)
def test_each_disease_of_the_config_is_found(what):
    target = tiny_target("llama")
    sick = dataclasses.replace(tiny_config(target), **DISEASES[what])
    assert any(re.search(what, finding.what) for finding in findings(sick, target.text_config))


@pytest.fixture
def head_dir(tmp_path):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    return tmp_path / "head"


def change_tensors(folder, **changes):
    tensors = load_file(folder / WEIGHTS)
    for name, make in changes.items():
        made = make(tensors)
        tensors.pop(name, None)
        if made is not None:
            tensors[name] = made.contiguous()
    save_file(tensors, folder / WEIGHTS)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TARGET_IDS = torch.arange(48)
# how the vocabulary was broken -> (d2t, t2d, what is said, sure to be an error)
VOCABULARIES = {
    "swapped names": (lambda t: t["t2d"], lambda t: t["_d2t"], "exchanged", True),
    "absolute ids": (lambda t: t["d2t"] + TARGET_IDS, None, "target ids where offsets", True),
    "zeros": (lambda t: torch.zeros_like(t["d2t"]), None, "name different tokens", True),
    "out of range": (lambda t: t["d2t"] + 100, None, "does not name 48 ascending ids", True),
    "t2d too small": (None, lambda t: t["t2d"] & (torch.arange(128) < 60), "t2d holds", False),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_broken_vocabulary_is_named_and_mended(head_dir, case):
    """d2t and t2d are rebuilt from each other, whichever of them the file still has right."""
    target = tiny_target("llama")
    want = read_head(head_dir).tensors
    make_d2t, make_t2d, message, is_error = VOCABULARIES[case]
    originals = {"_d2t": want["d2t"].clone()}
    change_tensors(
        head_dir,
        **{name: (lambda t, make=make: make({**want, **originals}))
           for name, make in (("d2t", make_d2t), ("t2d", make_t2d)) if make is not None},
    )  # fmt: skip
    with pytest.raises(UserError):
        read_head(head_dir)
    seen = examine(head_dir, target.text_config)
    (finding,) = [finding for finding in seen.findings if finding.topic == "vocab"]
    assert re.search(message, finding.what) and finding.repair and (finding.severity == "error") == is_error
    measured = seen.vocabularies["t2d"] if case == "zeros" else None  # two valid ones: measuring decides
    head, changes = repaired(seen, target.text_config, None, measured)
    check_head(head, head_dir)
    assert torch.equal(head.tensors["d2t"], want["d2t"]) and torch.equal(head.tensors["t2d"], want["t2d"])
    assert any("vocab" in change for change in changes)


def test_a_vocabulary_lost_on_both_sides_is_not_invented(head_dir):
    change_tensors(head_dir, d2t=lambda t: t["d2t"] * 0 + 500, t2d=lambda t: t["t2d"] & False)
    with pytest.raises(UserError, match="cannot be rebuilt"):
        examine(head_dir, None)


def test_files_against_each_other(head_dir):
    change_config(head_dir, tie_word_embeddings=True, dtype="float16")
    seen = examine(head_dir, None)
    assert {finding.topic for finding in seen.findings} == {"tie", "dtype"}
    change_tensors(head_dir, **{"norm.weight": lambda t: t["norm.weight"].float()})
    assert any("in one head" in finding.what for finding in examine(head_dir, None).findings)


def test_rules_without_measurements(head_dir):
    """The usual three written as outputs, a tied flag, short positions, two dtypes: mended from the files alone."""
    target = tiny_target("llama")
    outputs = [layer - 1 for layer in target.tap_layers]
    change_config(head_dir, tie_word_embeddings=True, max_position_embeddings=64,
                  eagle_aux_hidden_state_layer_ids=outputs)  # fmt: skip
    change_tensors(head_dir, **{"norm.weight": lambda t: t["norm.weight"].float()})
    head, changes = repaired(examine(head_dir, target.text_config), target.text_config, None, None)
    assert head.config.tap_layers == target.tap_layers and head.config.max_position_embeddings == 256
    assert {t.dtype for t in head.tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert len(changes) == 4 and any("tie_word_embeddings" in change for change in changes)


def test_another_targets_head_is_not_repaired(head_dir):
    change_config(head_dir, vocab_size=200)
    change_tensors(head_dir, t2d=lambda t: torch.nn.functional.pad(t["t2d"], (0, 72)))
    seen = examine(head_dir, tiny_target("llama").text_config)
    with pytest.raises(UserError, match="vocab_size is 200.*No copy"):
        repaired(seen, tiny_target("llama").text_config, None, None)


def test_nan_and_missing_tensors_end_the_examination(head_dir):
    change_tensors(head_dir, **{"fc.weight": lambda t: t["fc.weight"] * float("nan")})
    with pytest.raises(UserError, match="NaN"):
        examine(head_dir, None)
    change_tensors(head_dir, **{"fc.weight": lambda t: None})
    with pytest.raises(UserError, match="missing: fc.weight"):
        examine(head_dir, None)
