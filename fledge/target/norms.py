"""RMS norms of stock models as one kernel each.

transformers writes its norms out: six to eight operations that are launched one by one, four norms a layer. PyTorch has
them as one for a GPU, `native.py` for few rows on a CPU. Which modules are such norms is asked of them: some scale by
1 + weight, some round differently.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.target import card, gpu, native

ROWS = 4  # tried
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a value, relative: rounding


@torch.no_grad()
def rms_norms(model: nn.Module) -> dict[nn.Module, bool]:
    """The modules of a model that are RMS norms, up to rounding, with whether they scale by 1 + weight, which PyTorch's
    kernel for a GPU does not; on a CPU none without a compiler."""
    device = next(model.parameters()).device
    if device.type == "cpu" and not card.runs_on(device) and native.library() is None:
        return {}
    kinds = (False, True) if device.type == "cpu" or card.runs_on(device) else (False,)
    looking = [module for module in model.modules() if _may_be_one(module)]
    found: dict[nn.Module, bool] = {}
    for one_more in kinds:
        left = [module for module in looking if module not in found]
        errors = torch.stack([_error(module, one_more) for module in left]).tolist() if left else []
        good = [error < TOLERANCE.get(_weight(one).dtype, 0) for one, error in zip(left, errors, strict=True)]
        found |= {one: one_more for one, is_good in zip(left, good, strict=True) if is_good}
    return found


@contextmanager
def as_one_kernel(norms: Mapping[nn.Module, bool], most_rows: int = native.MOST_ROWS) -> Iterator[None]:
    """Inside the block these modules are `F.rms_norm` on a GPU and `native.rms_norm` on a CPU, for so many rows."""
    for module, one_more in norms.items():
        vars(module)["forward"] = _fused(module, one_more, most_rows)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


def eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)


def _may_be_one(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1


def _error(module: nn.Module, one_more: bool) -> Tensor:
    """The largest relative error of a value on random rows."""
    weight = _weight(module)
    rows = torch.linspace(-2, 3, ROWS * len(weight), device=weight.device, dtype=weight.dtype).view(ROWS, -1)
    expected, found = module(rows).float(), _fused(module, one_more)(rows).float()
    return ((found - expected).abs() / expected.abs().clamp_min(1e-3)).max()


def _fused(module: nn.Module, one_more: bool, most_rows: int = native.MOST_ROWS) -> Callable[[Tensor], Tensor]:
    weight, eps = _weight(module), eps_of(module)
    if weight.device.type != "cpu" or card.runs_on(weight.device):

        def on_gpu(hidden: Tensor) -> Tensor:
            if hidden.dtype is weight.dtype and card.fits(hidden, weight):
                return gpu.rms_norm(hidden, weight, eps, one_more=one_more)
            return F.rms_norm(hidden, weight.shape, weight + 1 if one_more else weight, eps)

        return on_gpu
    stock, kernel_weight = type(module).forward, weight.detach().contiguous()

    def forward(hidden: Tensor) -> Tensor:
        normed = native.rms_norm(hidden, kernel_weight, eps, one_more=one_more, most_rows=most_rows)
        return stock(module, hidden) if normed is None else normed

    return forward


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
