"""A GPU for machines without one: tensors that say they are on `cuda:0`, compute on the CPU, and are watched.

    with EmulatedDevice() as device:
        weight = device.put(torch.randn(8, 8))      # or torch.randn(8, 8).cuda(), or device="cuda" in any factory
        ...
    device.reads, device.waits, device.launches

- `reads`: values, or numbers of values, that the host asked for (`item`, `tolist`, `nonzero`, copies to the CPU ...):
  the host stops until the device has finished everything before;
- `waits`: copies to the device that the host waits for (of memory that is not asked for with `non_blocking`, numbers in
  `torch.tensor(..., device="cuda")`, CPU tensors as indices);
- `launches`: operations that start a kernel. Views and empty memory are none. An operation that a GPU has as one kernel
  is one even where a CPU decomposes it (norms, attention); its backward is counted as decomposed, which is too much.

What would raise on a GPU raises here: a CPU tensor (of more than one number) among those of the device. Attention with
a mask and `enable_gqa` is refused, for which a GPU has no fused kernel.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "__contains__"}
READING_OPS = (  # how many results there are depends on values
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim",
    "bincount", "equal", "is_nonzero",
)  # fmt: skip
ONE_KERNEL = {F.rms_norm, torch.rms_norm, F.layer_norm, F.scaled_dot_product_attention, F.silu, F.cross_entropy}
GROUPS = clip_grad._group_tensors_by_device_and_dtype
TORCH = str(Path(torch.__file__).parent)
NO_KERNEL = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh", "set_", "resize_", "_reshape_alias")
HOST_MAY_STAY = ("copy_", "_to_copy", "index", "index_put")  # said elsewhere, or counted as a copy


class DeviceTensor(Tensor):
    """A CPU tensor behind a face that says otherwise."""

    elem: Tensor
    watcher: "EmulatedDevice"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, watcher: "EmulatedDevice") -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=elem.device, requires_grad=elem.requires_grad,
        )  # fmt: skip
        made.elem, made.watcher = elem, watcher
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["elem"], self.watcher

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], watcher: Any, size: Any, stride: Any) -> "DeviceTensor":
        return DeviceTensor(inner["elem"], watcher)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        watcher = next(leaf.watcher for leaf in leaves if isinstance(leaf, DeviceTensor))
        watcher.saw(func, args, leaves)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not _is_view_of_other(func, args)):
            return cls._computed(func, args, kwargs, leaves, watcher)

    @classmethod
    def _computed(cls, func: Any, args: Any, kwargs: Any, leaves: list[Any], watcher: "EmulatedDevice") -> Any:
        plain_args, plain_kwargs = tree_map(_elem, (args, kwargs))
        made = EMULATED.get(func, func)(*plain_args, **plain_kwargs)
        if func._schema.is_mutable:  # what was written is what is returned
            given = {id(_elem(leaf)): leaf for leaf in leaves}
            made = tree_map(lambda one: given.get(id(one), one), made)
        return tree_map(lambda one: DeviceTensor(one, watcher) if type(one) is Tensor else one, made)


def _is_view_of_other(func: Any, args: Any) -> bool:
    """A view of what was made outside of inference mode is as if made there itself."""
    return func.is_view and not args[0].is_inference()


def _elem(leaf: Any) -> Any:
    return leaf.elem if isinstance(leaf, DeviceTensor) else leaf


class EmulatedDevice(TorchFunctionMode):
    """See above. Inside the block `device="cuda"` works."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.waits: list[str] = []
        self.operations: Counter[str] = Counter()
        self._inside_one = False

    def __enter__(self) -> "EmulatedDevice":
        """Backwards are watched, too: a mode that handles a call does not see what it calls."""
        self._engine = torch.autograd._engine_run_backward

        def watched(*args: Any, **kwargs: Any) -> Any:
            super(EmulatedDevice, self).__enter__()
            try:
                return self._engine(*args, **kwargs)
            finally:
                super(EmulatedDevice, self).__exit__(None, None, None)

        torch.autograd._engine_run_backward = watched
        clip_grad._group_tensors_by_device_and_dtype = _grouped
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.autograd._engine_run_backward = self._engine
        clip_grad._group_tensors_by_device_and_dtype = GROUPS
        super().__exit__(*error)

    @property
    def launches(self) -> int:
        return self.operations.total()

    def forget(self) -> None:
        """Counts begin again."""
        self.reads.clear()
        self.waits.clear()
        self.operations.clear()

    def put(self, thing: Any) -> Any:
        """A tensor, or a module with its parameters and buffers in place, on the device."""
        if not isinstance(thing, nn.Module):
            return thing if isinstance(thing, DeviceTensor) else DeviceTensor(thing.detach(), self)
        known: dict[int, nn.Parameter] = {}
        for module in thing.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    if id(weight) not in known:  # tied weights stay tied
                        known[id(weight)] = nn.Parameter(self.put(weight), weight.requires_grad)
                    module._parameters[name] = known[id(weight)]
            module._buffers.update({n: self.put(b) for n, b in module._buffers.items() if b is not None})
        return thing

    @staticmethod
    def peek(tensor: Tensor) -> Tensor:
        """The numbers of a tensor, for the test that looks at them."""
        assert isinstance(tensor, DeviceTensor)
        return tensor.elem

    # -- what the device is asked

    def saw(self, func: Any, args: Any, leaves: list[Any]) -> None:
        """Count an operation on tensors of the device."""
        name = func._schema.name.removeprefix("aten::")
        if name in READING_OPS or (name == "repeat_interleave" and isinstance(args[0], Tensor) and len(args) == 1):
            self.reads.append(where(name))
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [one for one in args[1] if one is not None]
            if any(one.dtype == torch.bool for one in indices):
                self.reads.append(where(f"{name} with a mask"))
            if any(not isinstance(one, DeviceTensor) and one.dim() for one in indices):
                self.waits.append(where(f"{name} with indices of the host"))
        elif name not in HOST_MAY_STAY:
            strangers = [leaf for leaf in leaves if type(leaf) is Tensor and leaf.dim()]
            assert not strangers, f"{name}: a CPU tensor among those of the device"
        if not func.is_view and not name.startswith(NO_KERNEL) and not self._inside_one:
            self.operations[name] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        own = bool(args) and isinstance(args[0], DeviceTensor)
        if name == "__get__" and own:
            if func == Tensor.device.__get__:
                return CUDA
            if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return True
            if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
                return False
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return self._moved(name, args, kwargs)
        if name == "copy_" and own != isinstance(args[1], DeviceTensor):
            return self._copied(args[0], args[1], non_blocking=kwargs.get("non_blocking") or args[2:3] == (True,))
        if name in READS and own:
            self.reads.append(where(name))
            return getattr(torch.Tensor, name)(args[0].elem, *map(_elem, args[1:]))
        if name == "pin_memory":
            return args[0]
        kwargs.pop("pin_memory", None)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return self._factory(func, args, {**kwargs, "device": "cpu"})
        if kwargs.get("device") is not None and own:  # `zeros_like(x, device="cpu")`
            return func(*map(_elem, args), **kwargs)
        if func in ONE_KERNEL and any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves((args, kwargs))):
            return self._one_kernel(func, args, kwargs)
        return func(*args, **kwargs)

    def _moved(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """`to`, `cuda` and `cpu`."""
        tensor, *rest = args
        goal = {"cuda": CUDA, "cpu": CPU}.get(name) or kwargs.pop("device", None)
        words = []
        for one in rest:
            if isinstance(one, Tensor):
                goal, kwargs["dtype"] = one.device if type(one) is Tensor else CUDA, one.dtype
            elif isinstance(one, bool):
                kwargs.setdefault("non_blocking", one)
            elif isinstance(one, str | torch.device | int):
                goal = one
            elif one is not None:
                words.append(one)
        here = isinstance(tensor, DeviceTensor)
        to_device = here if goal is None else torch.device(goal).type == "cuda"
        changed = tensor.to(*words, **kwargs) if words or kwargs else tensor
        if to_device == here:
            return changed
        if here:
            self.reads.append(where("a copy to the CPU"))
            return changed.elem
        if not kwargs.get("non_blocking") and tensor.dim():
            self.waits.append(where("a copy to the device"))
        return DeviceTensor(changed, self)

    def _copied(self, goal: Tensor, source: Tensor, *, non_blocking: bool) -> Tensor:
        """`copy_` from one side to the other."""
        if isinstance(source, DeviceTensor):
            if not non_blocking:
                self.reads.append(where("a copy to the CPU"))
            goal.copy_(source.elem)
            return goal
        if not non_blocking and source.dim():
            self.waits.append(where("a copy to the device"))
        goal.elem.copy_(source)  # type: ignore[attr-defined]
        return goal

    def _factory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        made = func(*map(_elem, args), **kwargs)
        name = func.__name__
        if name in ("tensor", "as_tensor", "asarray"):
            self.waits.append(where(f"torch.{name} of numbers of the host"))
        elif not name.startswith(("empty", "new_empty")):
            self.operations[name] += 1
        return tree_map(lambda one: DeviceTensor(one, self) if type(one) is Tensor else one, made)

    def _one_kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            masked = kwargs.get("attn_mask") is not None or len(args) > 3 and args[3] is not None
            assert not (masked and kwargs.get("enable_gqa")), "a GPU has no fused kernel for a mask and enable_gqa"
        self.operations[func.__name__] += not self._inside_one
        before, self._inside_one = self._inside_one, True
        try:
            return func(*args, **kwargs)
        finally:
            self._inside_one = before


def _grouped(lists: list[list[Tensor]], *args: Any) -> dict:
    """Tensors by device and dtype, as PyTorch's clipping of gradients asks below the level of modes."""
    on_device = isinstance(lists[0][0], DeviceTensor)
    found = GROUPS(lists, *args)
    return {(CUDA if on_device else device, dtype): group for (device, dtype), group in found.items()}


def where(what: str) -> str:
    """What was asked for, by whom, and the line of fledge that led there."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((__file__, TORCH))]
    ours = [frame for frame in frames if "/fledge/" in frame.filename]
    shown = dict.fromkeys(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in (*ours[-1:], frames[-1]))
    return f"{what} at {' -> '.join(shown)}"


# -- kernels that a CPU lacks ------------------------------------------------------------------------------------------


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool = False, *, window_size_left: int | None = None, window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`aten._flash_attention_forward` over documents end to end: q (S, h, d), k and v (N, g, d)."""
    weights, lse = _weights(q, k, ends_q, ends_k, causal, window_size_left)
    repeated = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = torch.einsum("hsk,khd->shd", weights, repeated).to(q.dtype)
    return out, lse, torch.zeros(2, dtype=torch.int64), torch.zeros(0), torch.zeros(0)


def flash_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends_q: Tensor, ends_k: Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool, rng: Tensor, unused: Tensor, *,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`aten._flash_attention_backward` with the log-sum-exp (h, S) it is given."""
    groups, repeat, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    weights, _ = _weights(q, k, ends_q, ends_k, causal, window_size_left, lse)
    keys, values = (part.float().repeat_interleave(repeat, dim=1) for part in (k, v))
    delta = (grad.float() * out.float()).sum(-1).T[..., None]  # (h, S, 1)
    grad_scores = weights * (torch.einsum("shd,khd->hsk", grad.float(), values) - delta) * scale
    dq = torch.einsum("hsk,khd->shd", grad_scores, keys)
    dk = torch.einsum("hsk,shd->khd", grad_scores, q.float()).unflatten(1, (groups, repeat)).sum(2)
    dv = torch.einsum("hsk,shd->khd", weights, grad.float()).unflatten(1, (groups, repeat)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _weights(
    q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor, causal: bool, left: int | None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h, S, N) softmax weights and their log-sum-exp (h, S); the last query of a document sees its last key."""
    sees = torch.zeros(len(q), len(k), dtype=torch.bool)
    for a, b, c, d in zip(ends_q.tolist(), ends_q[1:].tolist(), ends_k.tolist(), ends_k[1:].tolist(), strict=False):
        row, key = torch.arange(a, b)[:, None] - b + d, torch.arange(c, d)
        inside = torch.ones(b - a, d - c, dtype=torch.bool)
        if causal:
            inside &= key <= row
        if left is not None and left >= 0:
            inside &= key >= row - left
        sees[a:b, c:d] = inside
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("shd,khd->hsk", q.float(), keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees, float("-inf"))
    lse = scores.logsumexp(-1) if lse is None else lse
    return torch.exp(scores - lse[..., None]), lse


def counted(numbers: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`aten.histc` of whole numbers."""
    return aten.histc(numbers.float(), *args, **kwargs).to(numbers.dtype)


def add_product(
    total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor, beta: float = 1,
    alpha: float = 1,
) -> Tensor:  # fmt: skip
    """`aten.addmm` of 16-bit numbers into fp32."""
    return out.copy_(beta * total + alpha * (left.float() @ right.float()))


EMULATED = {
    aten.addmm.dtype_out: add_product,
    aten.histc.default: counted,
    aten._flash_attention_forward.default: flash_varlen,
    aten._flash_attention_backward.default: flash_varlen_backward,
}
