"""What no head may be is one line, wherever a head is read: decode, bench, export, convert, inspect and --init_from.

Such heads were taken by some commands and refused by others: integers were cast to floats, an epsilon of -1 gave NaN,
and an unknown activation was silently SiLU.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_target import save_target
from tiny import tiny_draft, tiny_target

from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import WEIGHTS, load_draft, save_draft
from fledge.drafters.eagle3.foreign import read_any
from fledge.drafters.eagle3.head import read_head
from fledge.errors import UserError

READERS: dict[str, Callable[[Path], Any]] = {
    "read_head": read_head,  # export, and every checkpoint that training continues
    "load_draft": lambda folder: load_draft(folder, tiny_target("llama").embedding_weight),  # decode, chat, bench
    "read_any": read_any,  # convert, --init_from and inspect
}


@pytest.fixture
def head(tmp_path) -> Path:
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head", dtype=torch.float32)
    return tmp_path / "head"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)


def rope(**changes) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changes}}


WRONG_CONFIGS = {
    "negative epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps"),
    "epsilon of 1": ({"rms_norm_eps": 1.0}, "rms_norm_eps=1.0"),
    "rope base 0": (rope(rope_theta=0), "rope_theta=0"),
    "rope base of text": (rope(rope_theta="1e4"), "rope_theta='1e4'"),
    "unknown rope": (rope(rope_type="spiral"), "rope .*spiral.* cannot be used"),
    "rope without its factor": (rope(rope_type="linear"), "cannot be used.*factor"),
    "rope of a third": (rope(partial_rotary_factor=0.35), "no even number"),
    "rope base true": (rope(rope_theta=True), "rope_theta=True"),
    "no activation": ({"hidden_act": ""}, "hidden_act=''"),
    "a layer more than its tensors": ({"num_hidden_layers": 2}, "missing: layers.1"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "no taps": ({"eagle_aux_hidden_state_layer_ids": []}, "eagle_aux_hidden_state_layer_ids"),
    "taps of an unknown kind": ({"fledge": {"tap_convention": "nonsense"}}, "tap_convention"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "taps beyond": ({"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, r"\[2, 4, 8\] .* of a target of 8 layers"),
    "negative tap": ({"eagle_aux_hidden_state_layer_ids": [-1, 4, 5]}, r"\[-1, 4, 5\]"),
    "taps of text": ({"eagle_aux_hidden_state_layer_ids": ["2"]}, r"Expected `int`, got `str`"),
    "size of text": ({"hidden_size": "64"}, "Expected `int.*hidden_size"),
    "size 0": ({"intermediate_size": 0}, "intermediate_size"),
    "size as a fraction": ({"vocab_size": 128.5}, "Expected `int.*vocab_size"),
    "norm of text": ({"fc_norm": "no"}, "Expected `bool.*fc_norm"),
    "mark of another type": ({"fledge": [1]}, "Expected `object.*fledge"),
}
WRONG_WEIGHTS = {
    "integers": ("fc.weight", lambda t: t.round().to(torch.int32), "fc.weight is int32; weights are float32"),
    "booleans": ("norm.weight", lambda t: t.bool(), "norm.weight is bool"),
    "8 bit": ("fc.weight", lambda t: t.to(torch.float8_e4m3fn), "fc.weight is float8_e4m3fn"),
    "complex": ("lm_head.weight", lambda t: t.to(torch.complex64), "lm_head.weight is complex64"),
    "infinity": ("norm.weight", lambda t: t * float("inf"), "norm.weight contains NaN or infinity"),
    "another shape": ("norm.weight", lambda t: t[:3], r"norm.weight has shape \(3,\)"),
    "offsets as floats": ("d2t", lambda t: t.float(), "d2t is torch.float32"),
    "offsets in two rows": ("d2t", lambda t: t[None], "d2t"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config_is_refused_by_every_reader(case, reader, head):
    changes, message = WRONG_CONFIGS[case]
    edit_config(head, **changes)
    with pytest.raises(UserError, match=message) as found:
        READERS[reader](head)
    assert str(head) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_refused_by_every_reader(case, reader, head):
    name, change, message = WRONG_WEIGHTS[case]
    edit_weights(head, name, change)
    with pytest.raises(UserError, match=message):
        READERS[reader](head)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sound_head_is_read(dtype, reader, head):
    """Negative control, in every number format that weights may have."""
    for name in load_file(head / WEIGHTS).keys() - {"d2t", "t2d"}:
        edit_weights(head, name, lambda tensor: tensor.to(dtype))
    edit_config(head, hidden_act="swish", rms_norm_eps=1e-5, **rope(rope_type="linear", factor=2.0))
    assert READERS[reader](head).config.hidden_act == "swish"


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), "llama", num_hidden_layers=8)


def commands(head: Path, target: Path, out: Path) -> dict[str, list[str]]:
    data = out / "data.jsonl"
    return {
        "export": [str(head), "--to", "vllm", "--output-dir", str(out)],
        "convert": [str(head), "--output-dir", str(out)],
        "inspect": [str(head)],
        "decode": ["--target", str(target), "--draft", str(head), "--prompt", "x"],
        "bench": ["--target", str(target), "--draft", str(head), "--bench-name", "quick", "--num-gpus-total", "0",
                  "--output-dir", str(out), "--question-end", "1"],
        "train": ["--target_model_name_or_path", str(target), "--train_data_path", str(data), "--init_from", str(head),
                  "--output_dir", str(out), "--max_steps", "1"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["export", "convert", "inspect", "decode", "bench", "train"])
def test_every_command_says_it_in_one_line(name, head, target, tmp_path, capsys, monkeypatch):
    from saved_target import write_conversations

    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    out.mkdir()
    write_conversations(out / "data.jsonl", 8)
    edit_config(head, hidden_act="gelu")
    assert run_command(name, commands(head, target, out)[name]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "hidden_act" in errors[0]
