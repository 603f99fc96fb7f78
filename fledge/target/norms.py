"""RMS norms of stock models as one kernel each.

transformers writes its norms out: six to eight operations that are launched one by one, four norms a layer. PyTorch has
them as one for a GPU, `native.py` for few rows on a CPU. Which modules are such norms is asked of them: some scale by
1 + weight, some round differently.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.target import native

ROWS = 4  # tried
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a value, relative: rounding


@torch.no_grad()
def rms_norms(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute what `F.rms_norm` does, up to rounding; on a CPU none without a compiler."""
    if next(model.parameters()).device.type == "cpu" and native.library() is None:
        return []
    looking = [module for module in model.modules() if _may_be_one(module)]
    if not looking:
        return []
    errors = torch.stack([_error(module) for module in looking]).tolist()
    return [one for one, error in zip(looking, errors, strict=True) if error < TOLERANCE.get(_weight(one).dtype, 0)]


@contextmanager
def as_one_kernel(norms: Sequence[nn.Module], most_rows: int = native.MOST_ROWS) -> Iterator[None]:
    """Inside the block these modules are `F.rms_norm` on a GPU and `native.rms_norm` on a CPU, for so many rows."""
    for module in norms:
        vars(module)["forward"] = _fused(module, most_rows)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


def _may_be_one(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1


def _error(module: nn.Module) -> Tensor:
    """The largest relative error of a value on random rows."""
    weight = _weight(module)
    rows = torch.linspace(-2, 3, ROWS * len(weight), device=weight.device, dtype=weight.dtype).view(ROWS, -1)
    expected, found = module(rows).float(), _fused(module)(rows).float()
    return ((found - expected).abs() / expected.abs().clamp_min(1e-3)).max()


def _fused(module: nn.Module, most_rows: int = native.MOST_ROWS):
    weight, eps = _weight(module), float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0)
    if weight.device.type != "cpu":
        return lambda hidden: F.rms_norm(hidden, weight.shape, weight, eps)
    stock, kernel_weight = type(module).forward, weight.detach().contiguous()

    def forward(hidden: Tensor) -> Tensor:
        normed = native.rms_norm(hidden, kernel_weight, eps, most_rows)
        return stock(module, hidden) if normed is None else normed

    return forward


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
