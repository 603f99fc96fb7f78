"""A draft step of two compiled calls is `DraftModel.step`, and steps aside where it would not be."""

import dataclasses

import pytest
import torch
from tiny import always_packed, tiny_config, tiny_target
from torch import Tensor

from fledge.drafters.eagle3.fused_step import FusedStep, fused_step
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.propose import DraftCache
from fledge.target import native, products
from fledge.target.products import accelerate

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")

BATCH, ROWS, KEYS = 2, 3, 7
KINDS = [{}, {"fc_norm": True, "norm_output": True}, {"norm_before_residual": True}, {"qk_norm": True},
         {"num_layers": 3, "qk_norm": True}]  # fmt: skip


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    monkeypatch.setattr(products, "choice_for", always_packed("loop"))


def draft_of(dtype: torch.dtype = torch.float32, **config) -> DraftModel:
    target, generator = tiny_target("llama"), torch.Generator().manual_seed(1)
    draft = DraftModel(dataclasses.replace(tiny_config(target), **config), target.embedding_weight).to(dtype)
    for parameter in draft.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:  # norms that do something
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    accelerate(draft, least_bytes=0)
    return draft


@torch.inference_mode()
def both(draft: DraftModel, output_row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What our step and the slow one make of the same rows behind a filled cache."""
    step = fused_step(draft)
    assert step is not None
    generator, dtype = torch.Generator().manual_seed(0), draft.fc.weight.dtype
    size, tokens = draft.config.hidden_size, torch.randint(40, (BATCH, ROWS), generator=generator)
    hidden = torch.randn(BATCH, ROWS, size, generator=generator).to(dtype)
    mask = torch.zeros(BATCH, 1, ROWS if output_row is None or draft.config.num_layers > 1 else 1, KEYS, dtype=dtype)
    mask[0, :, :, 1] = torch.finfo(dtype).min
    filled = torch.randn(2, 4, draft.config.num_key_value_heads, draft.config.head_dim, generator=generator).to(dtype)
    outputs = []
    for one in (step, draft.step):
        cache = DraftCache(draft, BATCH)
        cache.reserve(KEYS)
        for slot in range(BATCH):
            cache.fill(slot, [tuple(filled)] * draft.config.num_layers)
        rows = torch.arange(4, KEYS).expand(BATCH, -1)
        cache.open(rows, KEYS)
        outputs.append(one(tokens, hidden, None, cache, mask, rope=draft.rope(rows), output_row=output_row))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("output_row", [None, torch.tensor([2, 0])])
def test_it_is_the_slow_step(config, dtype, output_row):
    found, expected = both(draft_of(dtype, **config), output_row)
    error = (found - expected).float().norm() / expected.float().norm()
    assert found.shape == expected.shape and error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_new_weights_are_used():
    draft = draft_of()
    step = fused_step(draft)
    with torch.no_grad():
        draft.midlayer.mlp.down_proj.weight.mul_(2)
        draft.midlayer.post_attention_layernorm.weight.data = torch.rand(draft.config.hidden_size)
    before = step.layers[0][1].mlp_norm
    step.refresh()
    assert step.layers[0][1].mlp_norm != before
    torch.testing.assert_close(*both(draft), rtol=1e-4, atol=1e-5)


def test_gradients_and_autocast_take_the_slow_step(monkeypatch):
    draft = draft_of()
    step = fused_step(draft)
    calls: list[bool] = []
    monkeypatch.setattr(DraftModel, "step", lambda *args, **kwargs: calls.append(True))
    tokens, rows = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    cache, mask = DraftCache(draft, 1), torch.zeros(1, 1, 1, 1)
    given = (tokens, torch.zeros(1, 1, draft.config.hidden_size), None, cache, mask)
    step(*given, rope=draft.rope(rows))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        step(*given, rope=draft.rope(rows))
    assert len(calls) == 2


def test_who_is_fused(monkeypatch):
    """A head whose products are not the loop's, or of which only a part of every head is turned, is not."""
    assert isinstance(fused_step(draft_of()), FusedStep)
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert fused_step(draft_of(rope_parameters=partial)) is None
    monkeypatch.setattr(products, "choice_for", always_packed("onednn"))
    assert fused_step(draft_of()) is None
