"""`fledge inspect` of a block draft: shown without its target, tried with it."""

import torch
from block_reference import tiny_block
from saved_target import save_target

from fledge.cli import run_command
from fledge.doctor.inspect_block import block_readings, layers_of
from fledge.drafters.head_files import save_draft
from fledge.target.model import Target


def test_the_readings_are_both_layouts_and_taps_one_layer_off():
    from tiny import tiny_target

    config = tiny_block(tiny_target("llama"), "dspark").config  # taps 2, 4, 5 of 8 layers
    readings = list(block_readings(config, 8))
    found = [(reading.config.sample_from_anchor, reading.config.tap_layers[0]) for reading in readings]
    assert found == [(True, 2), (True, 3), (True, 1), (False, 2), (False, 3), (False, 1)]
    assert readings[0].config == config and layers_of(readings) == (1, 2, 3, 4, 5, 6)
    assert [reading.config.tap_layers[-1] for reading in block_readings(config, 6)] == [5, 4, 5, 4]


def test_an_untrained_draft_drafts_nothing_under_any_reading(tmp_path, capsys):
    target = Target.from_pretrained(str(save_target(tmp_path / "target")))
    draft = tiny_block(target, "dspark", draft_vocab_size=None)
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    assert run_command("inspect", [str(tmp_path / "draft")]) == 0
    shown = capsys.readouterr()
    assert "sample_from_anchor" in shown.out + shown.err and "give --target" in " ".join(shown.err.split())
    flags = ["--target", str(tmp_path / "target"), "--measure-prompts", "2"]
    assert run_command("inspect", [str(tmp_path / "draft"), *flags]) != 0
    assert "under every reading of the files: it drafts nothing" in " ".join(capsys.readouterr().err.split())
