"""The rotary embedding of stock models as one operation each for queries and keys, on a CPU.

In transformers it is a function of the module that defines the model, `apply_rotary_pos_emb`. Which of these compute
the usual one is asked of them: some interleave, some turn a part of a head only.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fledge.target import native

NAME = "apply_rotary_pos_emb"
PARAMETERS = ("q", "k", "cos", "sin", "unsqueeze_dim")

Rotate = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def usual_ropes(model: nn.Module) -> list[tuple[ModuleType, Rotate]]:
    """The modules whose function our operation can stand in for, with the functions; none where it is not compiled."""
    device = next(model.parameters()).device
    if device.type != "cpu" or native.library() is None:
        return []
    modules = {sys.modules[type(one).__module__] for one in model.modules()}
    found = [(module, getattr(module, NAME)) for module in modules if hasattr(module, NAME)]
    return [(module, rotate) for module, rotate in found if _is_usual(rotate)]


@contextmanager
def one_operation(ropes: Sequence[tuple[ModuleType, Rotate]]) -> Iterator[None]:
    """Inside the block these modules' functions are ours where ours can be."""
    for module, rotate in ropes:
        setattr(module, NAME, _replacement(rotate))
    try:
        yield
    finally:
        for module, rotate in ropes:
            setattr(module, NAME, rotate)


def _replacement(rotate: Rotate) -> Rotate:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **other: Any
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and not other and cos.dim() == 3 and q.dim() == k.dim() == 4:
            query, key = native.rope(q, cos, sin), native.rope(k, cos, sin)
            if query is not None and key is not None:
                return query, key
        return rotate(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **other)

    return apply_rotary_pos_emb


def _is_usual(rotate: Rotate) -> bool:
    """Whether this function, tried on numbers, gives what ours gives."""
    if tuple(inspect.signature(rotate).parameters) != PARAMETERS:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    try:
        expected = rotate(q, k, cos, sin)
    except RuntimeError:  # it wants cos and sin of another size
        return False
    ours = _replacement(rotate)(q, k, cos, sin)
    return all(torch.equal(one, other) for one, other in zip(expected, ours, strict=True))
