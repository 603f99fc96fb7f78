"""The compiled small operations are transformers' own, and step aside where they are not meant or not there."""

import shutil
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fledge.target import native, norms, ropes
from fledge.target.norms import as_one_kernel, rms_norms
from fledge.target.ropes import one_operation, usual_ropes

needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)


def stock_norm(dtype: torch.dtype, size: int = 40) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(size, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.uniform_(-1, 2)
    return norm


def module_of(defined_in: ModuleType) -> nn.Module:
    """A layer that is defined there."""
    layer = type("Layer", (nn.Module,), {"__module__": defined_in.__name__})()
    layer.weight = nn.Parameter(torch.zeros(1))
    return layer


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, native.MOST_ROWS + 1)])
@torch.inference_mode()
def test_norms(dtype, shape):
    torch.manual_seed(0)
    norm, states = stock_norm(dtype), 3 * torch.randn(*shape, 40).to(dtype)
    expected = norm(states)
    assert rms_norms(nn.Sequential(norm)) == {norm: False}
    with as_one_kernel({norm: False}):
        found = norm(states)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert "forward" not in vars(norm)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
@torch.inference_mode()
def test_embeddings_and_states_side_by_side(dtype, shape):
    torch.manual_seed(0)
    ids, table = torch.randint(9, shape), torch.randn(9, 40).to(dtype)
    states, norms = 3 * torch.randn(*shape, 40).to(dtype), (stock_norm(dtype), stock_norm(dtype))
    given = (table, norms[0].weight, states, norms[1].weight, 1e-5)
    expected = torch.cat((norms[0](table[ids]), norms[1](states)), dim=-1)
    found = native.beside(ids, *given)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert native.beside(ids, table.half(), *given[1:]) is None
    with pytest.raises(AssertionError):
        native.beside(ids + 9, *given)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, native.MOST_ROWS])
@torch.inference_mode()
def test_rotations_have_the_same_bits(dtype, rows):
    torch.manual_seed(0)
    query, key = (torch.randn(1, rows, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, rows, 8, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    for states, one in zip((query, key), expected, strict=True):
        assert torch.equal(native.rope(states, cos, sin), one)


@needs_compiler
@torch.inference_mode()
def test_which_rotations_are_replaced():
    """Llama's is; Cohere's interleaves and that of gpt-oss takes half of cos and sin. Afterwards it is as it was."""
    usual, *others = (usual_ropes(module_of(one)) for one in (modeling_llama, modeling_cohere, modeling_gpt_oss))
    assert [module for module, _ in usual] == [modeling_llama] and others == [[], []]
    stock = modeling_llama.apply_rotary_pos_emb
    with one_operation(usual):
        assert modeling_llama.apply_rotary_pos_emb is not stock
    assert modeling_llama.apply_rotary_pos_emb is stock


@needs_compiler
def test_what_is_left_to_pytorch():
    """Gradients, other dtypes, many rows, and rotations of a part of a head."""
    states, weight = torch.randn(2, 16), torch.ones(16)
    assert native.rms_norm(states, weight, 0.0) is None  # gradients may be wanted
    heads, turns = torch.randn(1, 2, 3, 16), torch.ones(1, 3, 16)
    with torch.inference_mode():
        assert native.rms_norm(states, weight, 0.0) is not None
        assert native.rms_norm(states.half(), weight.half(), 0.0) is None
        assert native.rms_norm(states.expand(99, 2, 16), weight, 0.0) is None
        assert native.rope(heads, turns, turns) is not None
        assert native.rope(heads, turns[..., :8], turns[..., :8]) is None
    assert native.beside(torch.zeros(2, dtype=torch.int64), states, weight, states, weight, 0.0) is None


def test_without_a_compiler(monkeypatch, tmp_path):
    """Nothing is replaced, and nothing fails; nor does it where the compiler does."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    for compiler in (None, shutil.which("false")):
        native.library.cache_clear()
        monkeypatch.setattr(native.shutil, "which", lambda _name, found=compiler: found)
        assert native.library() is None
        assert not norms.rms_norms(stock_norm(torch.float32))
        assert not ropes.usual_ropes(module_of(modeling_llama))
        native.attention_is_faster.cache_clear()
        assert not native.attention_is_faster()
    native.library.cache_clear()
    native.attention_is_faster.cache_clear()


@needs_compiler
def test_a_compiler_with_another_openmp(monkeypatch, tmp_path):
    """Its loops do without threads; everything else is there."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {shutil.which("cc")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native.shutil, "which", lambda _name: str(compiler))
    monkeypatch.setattr(native, "has_threads", lambda: True)
    native.library.cache_clear()
    found = native.library()
    native.library.cache_clear()
    assert found is not None and found.attend_bf16


@needs_compiler
def test_attention_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    for faster in (True, False):  # the second is not asked
        native.attention_is_faster.cache_clear()
        monkeypatch.setattr(native, "_measured", lambda faster=faster: native.Faster(faster))
        assert native.attention_is_faster()
    native.attention_is_faster.cache_clear()
