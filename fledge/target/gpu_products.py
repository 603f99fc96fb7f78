"""Products of few rows by a weight on a GPU: of joined weights, and by whatever was measured to be fastest there.

Projections of the same input are one product: of Qwen3-8B's layer 148 us on an H100 instead of 171, where reading the
weights takes 128. Ours (`kernels.py`) takes 134 for one row and 141 for eight (dev/log, "A quarter of an hour on
GPUs"). F.linear is the slow twin.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.outputs import cached
from fledge.target import card
from fledge.target.card import found, power

# R rows, X inputs, C outputs


class Joined:
    """One product for linear layers of the same input: their weights lie behind each other in one tensor."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs of all layers, inputs."""
        return sum(layer.out_features for layer in self.layers), self.layers[0].in_features

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """The joint weight and bias. The layers' own become views of them, so nothing is kept twice."""
        names = ("weight",) if self.layers[0].bias is None else ("weight", "bias")
        weight, *bias = (_joined([getattr(layer, name) for layer in self.layers]) for name in names)
        return weight, bias[0] if bias else None


def joined_of(*layers: nn.Module) -> Joined | None:
    """The product that these layers are; None where they are no plain linear layers of one kind on a card."""
    linear: list[nn.Linear] = [layer for layer in layers if type(layer) is nn.Linear and "forward" not in vars(layer)]
    if len(linear) < len(layers):
        return None
    alike = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in linear}
    with torch.no_grad():
        return Joined(linear) if len(alike) == 1 and card.fits(*(one.weight for one in linear)) else None


@torch.inference_mode(False)
@torch.no_grad()
def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """All of these (C, ..) as one tensor. Where they do not lie so yet, they are moved; they can still be trained."""
    tensors = [part.data for part in parts]
    end, behind = tensors[0].data_ptr(), True
    for one in tensors:
        behind = behind and one.is_contiguous() and one.data_ptr() == end
        end += one.nbytes
    one_storage = len({one.untyped_storage().data_ptr() for one in tensors}) == 1
    shape = (sum(len(one) for one in tensors), *tensors[0].shape[1:])
    if behind and one_storage:
        return tensors[0].as_strided(shape, tensors[0].stride())
    joint = torch.cat(tensors)
    for part, view in zip(parts, joint.split([len(one) for one in tensors]), strict=True):
        part.data = view
    return joint


@dataclass(frozen=True)
class ProductShape:
    """How a product is cut."""

    outputs: int  # of a program
    inputs: int  # at a time
    warps: int
    stages: int


SHAPES = {  # by the most rows that they are for
    1: (ProductShape(4, 1024, 4, 3), ProductShape(2, 2048, 4, 3)),
    16: (ProductShape(64, 256, 4, 4), ProductShape(64, 128, 4, 5)),
    64: (ProductShape(64, 128, 4, 4), ProductShape(64, 64, 4, 6), ProductShape(128, 64, 8, 5)),
}
EXACT, EXACT_ROWS = ProductShape(64, 128, 4, 4), 64  # of products whose rows do not depend on their number
TIMED_BYTES = 160 << 20  # of weights that are read in turn: more than a card's cache holds
MOST_TIMED = 64  # such weights; a model of so small ones is in the cache while it decodes, too


class BestShape(msgspec.Struct, frozen=True):
    """What was measured to be best for one product, kept in the user's cache folder."""

    shape: int | None  # which of SHAPES; None: PyTorch's


_best: dict[tuple[Any, ...], BestShape] = {}


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(states (R, X), weight (C, X), bias (C,)); few rows by whatever was measured to be fastest here."""
    most = next((most for most in SHAPES if len(states) <= most), None)
    suits = weight.dtype in (torch.bfloat16, torch.float16) and states.dtype is weight.dtype and weight.is_contiguous()
    if most is None or not suits or not states.is_contiguous() or not card.fits(states, weight):
        return F.linear(states, weight, bias)
    key = (most, *weight.shape, weight.dtype, bias is None, weight.device.index)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return F.linear(states, weight, bias)
        facts = (SHAPES, torch.cuda.get_device_name(), torch.__version__, found().triton.__version__, *key[:-1])
        try:
            _best[key] = cached("products", repr(facts), BestShape, lambda: _fastest(most, weight, bias))
        except torch.OutOfMemoryError:
            _best[key] = BestShape(None)
    number = _best[key].shape
    return F.linear(states, weight, bias) if number is None else multiply(states, weight, bias, SHAPES[most][number])


def linear_exact(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; a row has the same bits whatever rows stand beside it: any number of them is cut in one way."""
    return multiply(states.contiguous(), weight, bias, EXACT, EXACT_ROWS)


def multiply(
    states: Tensor, weight: Tensor, bias: Tensor | None, shape: ProductShape, block: int | None = None
) -> Tensor:
    """states (R, X) by weight (C, X), plus bias (C,): (R, C). `block`: rows of a program; all of them without it."""
    (rows, inputs), outputs = states.shape, len(weight)
    out = states.new_empty(rows, outputs)
    more: dict[str, Any] = {"HAS_BIAS": bias is not None, "BLOCK_C": shape.outputs, "BLOCK_X": shape.inputs}
    more |= {"num_warps": shape.warps, "num_stages": shape.stages}
    blocks = -(-outputs // shape.outputs)
    if rows == 1 and block is None:
        found().multiply_row[(blocks,)](states, weight, bias, out, outputs, inputs, **more)
        return out
    block = block or max(16, power(rows))
    found().multiply_rows[blocks, -(-rows // block)](
        states, weight, bias, out, rows, outputs, inputs, BLOCK_R=block, **more
    )
    return out


def _fastest(most: int, weight: Tensor, bias: Tensor | None) -> BestShape:
    """Times PyTorch's product and ours, over weights that the cache does not hold."""
    states = torch.randn(most, weight.shape[1], device=weight.device).to(weight.dtype)
    number = min(-(-TIMED_BYTES // weight.nbytes), MOST_TIMED)
    weights = [weight, *(weight.clone() for _ in range(number - 1))]
    ways: list[Callable[[Tensor], Tensor]] = [lambda one: F.linear(states, one, bias)]
    ways += [functools.partial(multiply, states, bias=bias, shape=shape) for shape in SHAPES[most]]
    graphs = {place: graph for place, way in enumerate(ways) if (graph := _captured(way, weights)) is not None}
    times = [{place: _seconds(graph) for place, graph in graphs.items()} for _ in range(5)]
    best = min(graphs, key=lambda place: min(each[place] for each in times))
    return BestShape(best - 1 if best else None)


def _captured(way: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Any:
    """None where the card has no room for it."""
    try:
        for one in weights[:2]:
            way(one)
    except found().OutOfResources:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in weights:
            way(one)
    return graph


def _seconds(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
