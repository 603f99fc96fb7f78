"""The head's product is F.linear's, to rounding, and is used where it says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fledge.target import linear
from fledge.target.linear import head_linear, head_logits


@pytest.mark.parametrize("rows", [(1,), (3,), (1, 8), (64,), (200,)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_linear_layer(rows, biased):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*rows, 96), torch.randn(4100, 96)
    bias = torch.randn(4100) if biased else None
    with torch.inference_mode():
        found, expected = head_linear(hidden, weight, bias), F.linear(hidden, weight, bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_where_it_is_used(monkeypatch):
    """Fp32 rows, a large matrix, no gradients: anything else is left to PyTorch."""
    calls: list[int] = []
    monkeypatch.setattr(linear.F, "linear", lambda hidden, *_: calls.append(1) or hidden)
    large, small = torch.randn(4096, 8), torch.randn(512, 8)
    with torch.inference_mode():
        head_linear(torch.randn(3, 8), large)
        assert not calls
        for hidden, weight in (
            (torch.randn(3, 8), small),
            (torch.randn(3, 8).bfloat16(), large),
        ):
            calls.clear()
            head_linear(hidden, weight)
            assert calls
    calls.clear()
    head_linear(torch.randn(3, 8), large)  # gradients may be wanted
    assert calls


def test_a_head_with_hooks_computes_for_itself():
    head, seen = nn.Linear(8, 4096), []
    head.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        head_logits(head, torch.randn(2, 8))
    assert seen


@pytest.mark.parametrize("biased", [False, True])
def test_bf16_on_a_processor_without_it(biased, monkeypatch):
    """Many rows go by way of fp32; few are left to PyTorch, and so is everything where bf16 has products."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 20, 96).bfloat16(), torch.randn(4100, 96).bfloat16()
    bias = torch.randn(4100).bfloat16() if biased else None
    calls: list[int] = []
    widened = linear._widened
    monkeypatch.setattr(linear, "_widened", lambda *given: calls.append(len(given)) or widened(*given))
    for able in (True, False):
        monkeypatch.setattr(linear, "multiplies_bf16", lambda able=able: able)
        with torch.inference_mode():
            found, expected = head_linear(hidden, weight, bias), F.linear(hidden, weight, bias)
            head_linear(hidden[0, :4], weight, bias)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert len(calls) == (not able)
