"""Whether there is a card for kernels of ours, and where it is. `gpu.py` and others have what they are for."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fledge.console import warn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # of a card whose matrix units know bf16


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels; None where there is no Triton or no card for it, or where Triton cannot compile."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return None
    try:
        from fledge.target import kernels
    except ImportError:
        return None
    try:
        _try(kernels)
    except Exception as error:  # no C compiler for what starts its kernels, a card that it does not know, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(
            f"Triton compiles no kernels here ({reason}): PyTorch's are used, which decode at two thirds of the speed."
        )
        return None
    return kernels


def _try(found: ModuleType) -> None:
    """Compile and run one of the kernels."""
    states = torch.ones(2, 16, device="cuda")
    out = torch.empty_like(states)
    found.rms_norm[2,](states, states[0], out, 16, 16, 16, 1e-6, ONE_MORE=False, BLOCK=16, num_warps=1)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: on the current card."""
    return device.type == "cuda" and kernels() is not None and device.index == torch.cuda.current_device()


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: plain numbers on a card, without gradient."""
    plain = all(type(one.data) is Tensor and one.dtype in DTYPES for one in tensors)
    return plain and not torch.is_grad_enabled() and all(runs_on(one.device) for one in tensors)


def found() -> Any:
    """The kernels, for those who have looked whether there are any."""
    there = kernels()
    assert there is not None
    return there


def power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(number - 1, 0).bit_length()
