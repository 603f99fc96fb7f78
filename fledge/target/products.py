"""The products of few rows that decoding a token pays for, by weights packed ahead.

On a CPU a decoding step reads every weight once, and PyTorch's products of 1 to 16 rows reach a third of what the
memory gives: oneDNN brings the weight into its own order in every call. Here that is done once, for oneDNN's kernel or
for the loop of `multiply.c`, which reads a weight in the order of its memory and keeps all sums in registers.
Microseconds per product, one core, AMD EPYC with AVX-512, weights from memory, bf16; fp32 behind the stroke:

    weight        rows    F.linear         oneDNN, packed   loop
    3072 x 576    1       453 / 624        257 / 499        150 / 309
    3072 x 576    8       575 / 949        280 / 550        251 / 420
    3072 x 576    16      725 / 1390       394 / 778        407 / 669
    3072 x 576    64      1439 / 3079      1198 / 2264      1245 / 2422
    49152 x 576   1       6817 / 10381     4047 / 7434      2457 / 5073
    49152 x 576   8       8742 / 20034     4495 / 8538      3997 / 6680

`accelerate` gives the `nn.Linear` layers of a model another `forward`; the modules, their weights and their state dict
stay. Layers that multiply the same input (q, k and v; gate and up) are one product. A packed weight is a copy of the
weight, made at the first product and again when the weight has changed.

*Rows are independent.* The packed kernels give a row the same bits however many rows are computed with it, F.linear
does not (in fp32). So one kernel is chosen for all numbers of rows of a shape: the faster packed one, unless F.linear
is faster still. Single rows are filled up where their bits would differ (oneDNN's), and few rows where more are faster.
All this is measured once per machine, PyTorch and shape, and kept in the user's cache folder. More than MOST_ROWS rows
of oneDNN's kernel, gradients, autocast and other dtypes take F.linear, the slow twin in the tests.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge import provenance
from fledge.outputs import cached
from fledge.target import native
from fledge.target.linear import is_plain, onednn_product

# R rows, X inputs, C outputs

MOST_ROWS = 256
LEAST_BYTES = 4 << 20  # of all weights: smaller models stay in the processor's caches
MEASURED_BYTES = 64 << 20  # weights that a measurement goes through, so that they come from memory
ROWS = (1, 2, 4, 8, 16)
COMPARED, COMPARED_BYTES = 64, 1 << 28  # rows, or bytes of weights, that are compared for each number of rows
PACKED_FOR = 32  # rows; what oneDNN is told when it packs
GAIN = 0.8  # of the time: rows are filled up where that is faster by so much, and F.linear is kept where it is
TIMINGS, MOST_TIMINGS = 5, 25  # as many where F.linear seems to be faster: it rarely is, and others use the machine
NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Kernel(NamedTuple):
    """A way to multiply by a weight that was packed for it."""

    pack: Callable[[Tensor], Tensor]  # of a weight (C, X)
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # inputs (.., X), packed weight, bias (C,): (.., C)


def onednn_packed(weight: Tensor) -> Tensor:
    """A weight (C, X) in oneDNN's own order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)


KERNELS = {"loop": Kernel(native.pack, native.multiply), "onednn": Kernel(onednn_packed, onednn_product)}


class ProductChoice(msgspec.Struct, frozen=True):
    """What was measured to be best for one shape."""

    kernel: str | None  # of KERNELS; None: F.linear
    fill: tuple[int, ...]  # how many rows to compute for 1, 2, .. rows
    independent: bool  # a row's bits do not depend on the number of rows


class Product:
    """One packed product for layers that multiply the same input."""

    def __init__(self, layers: Sequence[nn.Linear], choice: ProductChoice) -> None:
        self.layers, self.choice = tuple(layers), choice
        self.kernel = KERNELS[choice.kernel or "onednn"]
        self.is_loop = choice.kernel == "loop"
        self.most_rows = sys.maxsize if self.is_loop else MOST_ROWS
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        self._packed_of: list[tuple[int, int]] = []
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # of the last input, until the other layers ask for them

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs of all layers, inputs."""
        return sum(layer.out_features for layer in self.layers), self.layers[0].in_features

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_bias": None, "_packed_of": [], "_input": None, "_outputs": {}}

    def of(self, place: int, inputs: Tensor) -> Tensor:
        """What the layer at `place` makes of inputs (.., X)."""
        weight = self.layers[place].weight
        num_rows = inputs.numel() // max(inputs.shape[-1], 1)
        if not 0 < num_rows <= self.most_rows or torch.is_grad_enabled() or not _suits(inputs, weight):
            return F.linear(inputs, weight, self.layers[place].bias)
        if inputs is not self._input or place not in self._outputs:
            output = self._computed(inputs, num_rows)
            if len(self.layers) == 1:
                return output
            parts = output.split([layer.out_features for layer in self.layers], dim=-1)
            self._input, self._outputs = inputs, dict(enumerate(parts))
        output = self._outputs.pop(place)
        if not self._outputs:
            self._input = None
        return output

    def _computed(self, inputs: Tensor, num_rows: int) -> Tensor:
        self.pack()
        assert self._packed is not None
        wanted = self.filled(num_rows)
        if wanted == num_rows:
            return self.kernel.multiply(inputs.contiguous(), self._packed, self._bias)
        rows = F.pad(inputs.reshape(num_rows, -1), (0, 0, 0, wanted - num_rows))
        return self.kernel.multiply(rows, self._packed, self._bias)[:num_rows].view(*inputs.shape[:-1], -1)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """The packed weight and the bias of all layers."""
        self.pack()
        assert self._packed is not None
        return self._packed, self._bias

    def filled(self, num_rows: int) -> int:
        """How many rows to compute for so many."""
        return self.choice.fill[num_rows - 1] if num_rows <= len(self.choice.fill) else num_rows

    def pack(self) -> None:
        """Pack the weights, again where a weight has changed."""
        weights = [layer.weight for layer in self.layers]
        now = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if now != self._packed_of:
            self._packed, self._packed_of = self.kernel.pack(joined(weights)), now
            self._bias = joined([layer.bias for layer in self.layers]) if self.layers[0].bias is not None else None


class PackedForward:
    """The `forward` of a layer whose product is packed."""

    def __init__(self, product: Product, place: int) -> None:
        self.product, self.place = product, place

    def __call__(self, input: Tensor) -> Tensor:
        return self.product.of(self.place, input)


def accelerate(model: nn.Module, *, least_bytes: int = LEAST_BYTES) -> None:
    """Pack the products of a model that decodes on a CPU. A model too small to gain or too large for its weights to lie
    in memory twice stays as it is; so do layers of other kinds, dtypes and devices. Done again, it does nothing."""
    groups = [group for group in neighbours(model) if not any("forward" in vars(layer) for layer in group)]
    num_bytes = sum(layer.weight.nbytes for group in groups for layer in group)
    if not groups or num_bytes < least_bytes or num_bytes > free_memory() / 2:
        return
    by_shape: dict[str, list[list[nn.Linear]]] = {}
    for group in groups:
        by_shape.setdefault(_shape(group), []).append(group)
    for shape, alike in by_shape.items():
        choice = choice_for(shape, alike)
        for group in alike if choice.kernel else ():
            product = Product(group, choice)
            for place, layer in enumerate(group):
                vars(layer)["forward"] = PackedForward(product, place)


def is_packed(layer: nn.Module) -> bool:
    """Whether this layer computes by a packed product."""
    return isinstance(vars(layer).get("forward"), PackedForward)


def is_independent(layer: nn.Module) -> bool:
    """Whether this layer gives a row the same bits in any company."""
    forward = vars(layer).get("forward")
    return isinstance(forward, PackedForward) and forward.product.is_loop and forward.product.choice.independent


def loop_of(*layers: nn.Module) -> Product | None:
    """The product by `multiply.c` that these layers are, in this order and no others; None where there is none."""
    product = product_of(*layers)
    return product if product is not None and product.is_loop else None


def product_of(*layers: nn.Module) -> Product | None:
    """The packed product that these layers are, in this order and no others; None where there is none."""
    forwards = [vars(layer).get("forward") for layer in layers]
    first = forwards[0]
    return first.product if isinstance(first, PackedForward) and first.product.layers == layers else None


def neighbours(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """The linear layers that can be packed, those of the same input together."""
    taken: set[nn.Module] = set()
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _can_be_packed(child)}
        for names in NEIGHBOURS:
            group: list[Any] = [children[name] for name in names if name in children]
            alike = {(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in group}
            if len(group) == len(names) and len(alike) == 1 and taken.isdisjoint(group):
                taken.update(group)
                yield group
        for child in children.values():
            if isinstance(child, nn.Linear) and child not in taken:
                taken.add(child)
                yield [child]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Weights or biases of several layers as those of one."""
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


# -- what is best, measured --------------------------------------------------------------------------------------------


def choice_for(shape: str, groups: Sequence[Sequence[nn.Linear]]) -> ProductChoice:
    """The choice for products of this shape, measured with these layers once per machine."""
    machine = f"{provenance.processor()}, {torch.get_num_threads()} threads"
    key = f"{machine}, torch {torch.__version__}, compiled {native.fingerprint()}: {shape}"
    return cached("products", key, ProductChoice, lambda: measured_choice(groups))


@torch.inference_mode()
def measured_choice(groups: Sequence[Sequence[nn.Linear]]) -> ProductChoice:
    """Compare F.linear and the packed products of such layers."""
    weights = [joined([layer.weight for layer in group]) for group in groups]
    weights = weights[: max(1, MEASURED_BYTES // weights[0].nbytes)]
    kernels, ready = _kernels_for(weights[0]), {}
    for name in tuple(kernels):
        try:
            ready[name] = [kernels[name].pack(weight) for weight in weights]
            kernels[name].multiply(weights[0].new_ones(1, weights[0].shape[1]), ready[name][0], None)
        except RuntimeError:  # oneDNN has no such product for this processor
            del kernels[name]
    if not kernels:
        return ProductChoice(None, (), False)

    def stock(rows: int) -> None:
        for weight in weights:
            F.linear(inputs[rows], weight)

    def ahead(name: str) -> Callable[[int], None]:
        def product(rows: int) -> None:
            for weight in ready[name]:
                kernels[name].multiply(inputs[rows], weight, None)

        return product

    inputs = {rows: weights[0].new_ones(rows, weights[0].shape[1]) for rows in ROWS}
    calls = [(stock, ROWS[0]), (stock, ROWS[-1])] + [(ahead(name), rows) for name in kernels for rows in ROWS]
    seconds = np.full(len(calls), np.inf)
    for turn in range(MOST_TIMINGS + 1):
        now = [_seconds(call, rows) for call, rows in calls]
        seconds = np.minimum(seconds, now) if turn else seconds  # the first turn makes things ready
        by_kernel = dict(zip(kernels, seconds[2:].reshape(-1, len(ROWS)), strict=True))
        best = min(by_kernel, key=lambda name: by_kernel[name].sum())
        faster = bool(GAIN * by_kernel[best][[0, -1]].sum() < seconds[:2].sum())
        if turn >= TIMINGS and faster:
            break
    if not faster:
        return ProductChoice(None, (), False)
    least = least_rows(kernels[best], weights[0])
    fill = _best_fill(by_kernel[best], least or 1) if best == "onednn" else ()
    return ProductChoice(best, fill, least is not None)


def _kernels_for(weight: Tensor) -> dict[str, Kernel]:
    """Those of KERNELS that take such a weight."""
    loop = native.can_multiply(weight.shape[0], weight.shape[1], weight.dtype)
    can = {"loop": loop, "onednn": torch.backends.mkldnn.is_available()}
    return {name: kernel for name, kernel in KERNELS.items() if can[name]}


def least_rows(kernel: Kernel, weight: Tensor) -> int | None:
    """The fewest rows from which on a row's bits do not depend on how many there are; None where they always do.

    Sums in two orders often round to the same bf16 number. So many rows are compared, of numbers of very different
    sizes as activations are: random normal ones hid the difference that single rows of SmolLM2's down_proj have.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(MOST_ROWS, weight.shape[1], generator=generator)
    inputs = (inputs * torch.randn(inputs.shape, generator=generator).mul(2).exp()).to(weight.dtype)
    packed = kernel.pack(weight)
    whole = kernel.multiply(inputs, packed, None)
    pieces = min(COMPARED, max(2, COMPARED_BYTES // weight.nbytes))
    least = 1
    for rows in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128):
        for start in range(0, min(MOST_ROWS, rows * pieces) - rows + 1, rows):
            part = slice(start, start + rows)
            if not torch.equal(kernel.multiply(inputs[part], packed, None), whole[part]):
                least = rows + 1
                break
    return least if least <= ROWS[-1] else None


def _best_fill(seconds: np.ndarray, least: int) -> tuple[int, ...]:
    """For 1, 2, .. rows the number to compute: more than there are where that is faster, `least` at least."""
    fill = []
    for rows in range(1, ROWS[-1] + 1):
        start = max(rows, least)
        cost = float(np.interp(start, ROWS, seconds))
        better = [(time, more) for time, more in zip(seconds, ROWS, strict=True) if more > start and time < GAIN * cost]
        fill.append(min(better, default=(cost, start))[1])
    return tuple(fill)


def _seconds(call: Callable[[int], None], rows: int) -> float:
    """Of this process: others on the machine count less than by the wall clock."""
    start = time.process_time()
    call(rows)
    return time.process_time() - start


def free_memory() -> int:
    """Bytes that can be had without swapping, as far as the system says."""
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62
    return kib << 10


def _shape(group: Sequence[nn.Linear]) -> str:
    dtype = str(group[0].weight.dtype).removeprefix("torch.")
    return f"{sum(layer.out_features for layer in group)} x {group[0].in_features} {dtype}"


def _can_be_packed(module: nn.Module) -> bool:
    """A plain linear layer in memory, of a dtype that a kernel packs."""
    if type(module) is not nn.Linear or not is_plain(module.weight) or module.weight.device.type != "cpu":
        return False
    return module.weight.dtype in native.NAMES


def _suits(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.dtype == weight.dtype and inputs.device == weight.device and not torch.is_autocast_enabled("cpu")
        and is_plain(inputs)
    )  # fmt: skip
