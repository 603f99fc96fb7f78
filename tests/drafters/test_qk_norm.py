"""EAGLE-3 heads of a Qwen3 layer, whose queries and keys are normed by head: trained, decoded, written and read."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from round_trip import there_and_back
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_config, tiny_target, tiny_vocab

from fledge.decoding.generate import generate
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.foreign import read_any
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.propose import DraftCache
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.servable import check_draft
from fledge.export.settings import ExportSettings
from fledge.target.record import TargetRecord


def qk_draft(qk_norm: bool = True) -> DraftModel:
    target = tiny_target("qwen3")
    torch.manual_seed(3)
    config = dataclasses.replace(tiny_config(target), qk_norm=qk_norm)
    draft = DraftModel(config, target.embedding_weight)
    draft.set_vocab(*tiny_vocab(config.vocab_size, config.draft_vocab_size, 3))
    for norm in (draft.midlayer.self_attn.q_norm, draft.midlayer.self_attn.k_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return draft.eval().requires_grad_(False)


def record(length: int = 14) -> TargetRecord:
    ids = torch.tensor(prompt(length))
    output = tiny_target("qwen3").forward(ids[None])
    return TargetRecord(
        sample_id="r", input_ids=ids, loss_mask=torch.arange(length) >= 4, position_ids=torch.arange(length),
        tap_hidden=output.tap_hidden[0], last_hidden=output.last_hidden[0],
    )  # fmt: skip


def test_queries_and_keys_are_normed_before_they_turn():
    """By the formula, against the projections of a head without norms: values are left alone."""
    draft, plain = qk_draft(), qk_draft(qk_norm=False)
    plain.load_state_dict(draft.state_dict(), strict=False)
    embeds, hidden = torch.randn(2, 5, draft.config.hidden_size).unbind()
    still = (torch.ones(5, draft.config.head_dim), torch.zeros(5, draft.config.head_dim))
    raw, found = plain.project(embeds, hidden, still), draft.project(embeds, hidden, still)
    layer, eps = draft.midlayer.self_attn, draft.config.rms_norm_eps
    for before, after, norm in zip(raw, found, (layer.q_norm, layer.k_norm, None), strict=True):
        if norm is not None:
            before = before / (before.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight
        torch.testing.assert_close(after, before)


def test_unrolled_is_decoding_with_a_cache():
    draft, one, steps = qk_draft(), record(), 3
    batch = pack([one])
    alignment = align(batch, steps)
    logits = draft.lm_head(torch.stack(unroll(draft, batch, alignment, steps)))
    row = int(alignment.rows[-1]) - steps
    index = int((alignment.rows == row).nonzero())
    cache = DraftCache(draft, 1)
    cache.reserve(row + 2 + steps)
    cache.open(torch.arange(row + 1)[None], row + 1)
    out = draft.step(
        one.input_ids[None, 1 : row + 2], draft.fuse(one.tap_hidden[: row + 1])[None],
        torch.arange(row + 1)[None], cache, output_row=torch.tensor([row]),
    )  # fmt: skip
    for step in range(steps):
        torch.testing.assert_close(draft.logits(out)[0, 0], logits[step, index], rtol=1e-4, atol=1e-4)
        cache.open(torch.tensor([[row + 1 + step]]), row + 2 + step)
        token, position = one.input_ids[row + 2 + step], torch.tensor([[row + step + 1]])
        out = draft.step(token[None, None], draft.feedback(out), position, cache)


def test_text_is_the_targets():
    target, options = tiny_target("qwen3"), {"max_new_tokens": 12, "eos_token_ids": ()}
    plain = generate(target, None, prompt(6), **options).token_ids
    assert generate(target, qk_draft(), prompt(6), tree=TreeShape(12, 3, 3), **options).token_ids == plain


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_there_and_back(layout, tmp_path):
    """vLLM reads such a head by another class: its name in our layout, the layer's type in the speculators layout."""
    out = there_and_back(qk_draft(), layout, tmp_path)
    document = json.loads((out / "config.json").read_text())
    layer = document if layout == "vllm" else document["transformer_layer_config"]
    assert layer["model_type"] == "qwen3"
    assert layout != "vllm" or document["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    check_draft(str(out), "T", 3)


def test_what_would_be_another_network_is_refused(tmp_path):
    save_draft(qk_draft(), tmp_path / "head", dtype=torch.float32)
    with pytest.raises(UserError, match="qk_norm, which the reader of the sglang layout ignores"):
        export_head(ExportSettings(head=str(tmp_path / "head"), to="sglang", output_dir=tmp_path / "out"))
    tensors = load_file(tmp_path / "head" / WEIGHTS)
    del tensors["midlayer.self_attn.q_norm.weight"]
    save_file(tensors, tmp_path / "head" / WEIGHTS)
    with pytest.raises(UserError, match="midlayer.self_attn.q_norm.weight"):
        read_any(Path(tmp_path / "head"))
