"""The lean layers against plain autograd: values, gradients, and what they keep."""

import pytest
import torch
import torch.nn.functional as F

from fledge.drafters.layers import RMSNorm, SwiGLU

SIZE, INNER, ROWS = 24, 40, 11


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def kept_bytes(run) -> int:
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_the_library_s(dtype):
    norm, hidden = RMSNorm(SIZE, eps=1e-5), rows(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    probe = torch.randn(ROWS, SIZE).to(dtype)
    exact = hidden.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    wanted = F.rms_norm(exact, (SIZE,), weight, 1e-5)
    found = norm(hidden)
    assert found.dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    ours = torch.autograd.grad((found * probe).sum(), [hidden, norm.weight])
    theirs = torch.autograd.grad((wanted * probe.double()).sum(), [exact, weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, **{**tolerance, "atol": 10 * tolerance["atol"]})
    with torch.no_grad():
        torch.testing.assert_close(norm(hidden), found)


def test_norm_keeps_its_dtype_under_autocast():
    norm = RMSNorm(SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(rows(torch.bfloat16)).dtype == torch.bfloat16


def test_mlp_equals_plain_autograd_and_keeps_half():
    mlp, hidden = SwiGLU(SIZE, INNER), rows()
    probe = torch.randn(ROWS, SIZE)

    def plain() -> torch.Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))

    leaves = [hidden, *mlp.parameters()]
    torch.testing.assert_close(mlp(hidden), plain())
    for ours, theirs in zip(
        torch.autograd.grad((mlp(hidden) * probe).sum(), leaves),
        torch.autograd.grad((plain() * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    wide = ROWS * INNER * 4
    assert kept_bytes(plain) - kept_bytes(lambda: mlp(hidden)) == 2 * wide


def test_mlp_passes_gradcheck():
    mlp = SwiGLU(SIZE, 6).double()
    assert torch.autograd.gradcheck(mlp, rows().double().detach()[:3].requires_grad_())
