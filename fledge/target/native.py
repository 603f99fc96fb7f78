"""Small operations, the attention and the products of a decoding step on a CPU, compiled from `native.c`, `attend.c`
and `multiply.c` where a C compiler is there.

transformers writes norms and rotary embeddings out as chains of eight and eighteen operations. Each of them costs
microseconds to begin, whatever it computes, and a step has a thousand. A call of `native.c` costs one beginning, and
two calls are a decoder layer but for its attention. It rounds where the chain does, so the result is the same to the
last bit of a sum's order. A row of the attention has bits that depend on what it sees alone, in a fifth to four fifths
of the time of PyTorch's kernel where the processor has AVX-512 or AVX2; elsewhere it may be slower, so that is
measured. So are the products (`products.py`). Compiled in some five seconds, once per machine and source, into the
user's cache folder. Without a compiler everything works, slower.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge import provenance
from fledge.outputs import cache_folder, cached

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SOURCES = {"native.c": ("-ffp-contract=off",), "attend.c": (), "multiply.c": ()}  # the first rounds as transformers do
HEADERS = ("vectors.h",)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
MOST_ROWS = 64  # with more, PyTorch's threads are worth more
TIMED_ROWS, TIMINGS = (1, 8), 50  # of each way to compute attention; the fastest counts
WORTH_THREADS = 1 << 17  # products of a call's queries and keys
BYTES_OF_A_THREAD = 1 << 16  # of a weight: fewer are not worth a thread
FEW_ROWS = 8  # they fit the nearest cache however they lie
SHARED_ROWS, LANES, MOST_HEAD = 4, 16, 256  # BLOCK, LANES, LANES * MOST_VECTORS of attend.c
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [POINTER] * 3 + [NUMBER] * 3 + [REAL],
    "beside": [POINTER] * 6 + [NUMBER] * 2 + [REAL],
    "rope": [POINTER] * 4 + [NUMBER] * 7,
    "before": [POINTER] * 8 + [NUMBER] * 3,
    "behind": [POINTER] * 6 + [NUMBER] * 2,
    "attend": [POINTER] * 7 + [NUMBER] * 16 + [REAL] * 2,
    "multiply": [POINTER] * 4 + [NUMBER] * 5,
    "pack": [POINTER] * 2 + [NUMBER] * 3,
}
MOST_SIZE = 1024  # of a head


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operations; None where there is no compiler or nothing that it makes can be loaded."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    for threads in (("-fopenmp",), ()) if has_threads() else ((),):
        try:
            found = _loaded(compiler, threads)
        except (OSError, subprocess.SubprocessError):  # clang's OpenMP, for one, is not the one that PyTorch has
            continue
        for operation, types in ARGUMENTS.items():
            for name in NAMES.values():
                getattr(found, f"{operation}_{name}").argtypes = types
                getattr(found, f"{operation}_{name}").restype = None
        return found
    return None


def _loaded(compiler: str | None, threads: Sequence[str]) -> ctypes.CDLL:
    """The library, compiled before or now."""
    texts = [(FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    facts = [texts, FLAGS, SOURCES, threads, provenance.processor(), compiler or ""]
    path = cache_folder("native") / f"{hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()}.so"
    if not path.is_file():
        if compiler is None:
            raise FileNotFoundError(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, threads, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, threads: Sequence[str], path: Path) -> None:
    """All sources at once, then one library. OpenMP is not linked: the process has PyTorch's."""
    parts = {name: path.with_name(f"{name}.{os.getpid()}.o") for name in SOURCES}
    building = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        running = [
            subprocess.Popen(
                [compiler, "-x", "c", *FLAGS, *SOURCES[name], *threads, "-c", str(FOLDER / name), "-o", str(part)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for name, part in parts.items()
        ]  # fmt: skip
        if any([one.wait(timeout=120) for one in running]):
            raise subprocess.SubprocessError(f"{compiler} could not compile {', '.join(SOURCES)}")
        link = [compiler, "-shared", *map(str, parts.values()), "-o", str(building), "-lm"]
        subprocess.run(link, check=True, capture_output=True, timeout=60)
        os.replace(building, path)
    finally:
        for part in (*parts.values(), building):
            part.unlink(missing_ok=True)


@functools.cache
def has_threads() -> bool:
    """Whether PyTorch's own OpenMP is GNU's, whose threads our loops can share; its names are made visible."""
    try:
        maps = Path("/proc/self/maps").read_text()
        (path,) = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line}
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except (OSError, ValueError):
        return False
    return True


def fingerprint() -> str:
    """Of the source, compiler and flags behind `library`; "none" without one. Findings about it are kept under it."""
    found = library()
    return "none" if found is None else Path(found._name).stem


class Faster(msgspec.Struct, frozen=True):
    """What was measured on this machine, kept in the user's cache folder."""

    attention: bool  # the loop takes less time than PyTorch's kernel


@functools.cache
def attention_is_faster() -> bool:
    """Whether `attend` is, for plain decoding and a small tree together; False without a compiler."""
    if library() is None:
        return False
    return cached("attention", f"{provenance.costs_key()}, {fingerprint()}", Faster, _measured).attention


@torch.inference_mode()
def _measured() -> Faster:
    seconds = [0.0, 0.0]
    for rows in TIMED_ROWS:
        query, key, value = (torch.randn(1, heads, n, 64).bfloat16() for heads, n in ((9, rows), (3, 256), (3, 256)))
        mask = torch.zeros(1, 1, rows, 256, dtype=torch.bfloat16)
        for index, each in enumerate(_least_seconds(query, key, value, mask)):
            seconds[index] += each
    return Faster(seconds[0] < seconds[1])


def _least_seconds(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[float]:
    """Of `attend` and of PyTorch's kernel, in turns."""
    ways = (
        lambda: attend(query, key, value, mask, 0.125),
        lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.125, enable_gqa=True),
    )
    least = [math.inf, math.inf]
    for _ in range(TIMINGS):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            least[index] = min(least[index], time.perf_counter() - start)
    return least


def rms_norm(
    states: Tensor, weight: Tensor, eps: float, *, one_more: bool = False, most_rows: int = MOST_ROWS
) -> Tensor | None:
    """(.., H) scaled to RMS 1 and by `weight` (H,), or by 1 + weight; None where PyTorch should do it."""
    size = weight.shape[0]
    rows = states.numel() // size
    if states.dtype is not weight.dtype or not 0 < rows <= most_rows or not _suits(states) or library() is None:
        return None
    states, out = states.contiguous(), torch.empty(states.shape, dtype=states.dtype)
    _kernel("rms_norm", NAMES[states.dtype])(
        states.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, one_more, eps
    )
    return out


def beside(ids: Tensor, table: Tensor, first: Tensor, states: Tensor, second: Tensor, eps: float) -> Tensor | None:
    """Rows of a table (V, H) by their ids (..) int64 and states (.., H), normed by `first` and `second` (H,), side by
    side: (.., 2H). None where PyTorch should do it."""
    kind, rows, size = states.dtype, ids.numel(), states.shape[-1]
    alike = all(one.dtype is kind and one.is_cpu for one in (table, first, second)) and ids.is_cpu
    if not alike or not table.is_contiguous() or not _suits(states) or not 0 < rows <= MOST_ROWS or library() is None:
        return None
    ids, states, out = ids.contiguous(), states.contiguous(), torch.empty(*ids.shape, 2 * size, dtype=kind)
    least, most = ids.aminmax()
    assert states.shape == (*ids.shape, size) and 0 <= int(least) <= int(most) < len(table)
    _kernel("beside", NAMES[kind])(
        ids.data_ptr(), table.data_ptr(), first.data_ptr(), states.data_ptr(), second.data_ptr(), out.data_ptr(),
        rows, size, eps,
    )  # fmt: skip
    return out


def rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Rotary embedding, half-split layout: states (B, h, S, d), cos and sin (B, S, d); None where PyTorch should."""
    batch, heads, rows, size = states.shape
    alike = cos.shape == sin.shape == (batch, rows, size) and cos.dtype is sin.dtype is states.dtype
    if not alike or not 0 < batch * rows <= MOST_ROWS or states.stride(3) != 1 or size % 2 or not _suits(states):
        return None
    cos, sin, out = cos.contiguous(), sin.contiguous(), torch.empty(states.shape, dtype=states.dtype)
    kernel = _kernel("rope", NAMES[states.dtype])
    pointers = (states.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    kernel(*pointers, batch, heads, rows, size, *states.stride()[:3])
    return out


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, softcap: float | None = None,
    sinks: Tensor | None = None, most_rows: int = MOST_ROWS,
) -> Tensor | None:  # fmt: skip
    """Attention of few rows: query (B, h, S, d), key (B, g, K, d), value (B, g, K, e), mask (B or 1, 1, S, K) added to
    scores (None: every row sees every key), sinks (h,) -> (B, S, h, e). None where PyTorch should do it."""
    (batch, heads, rows, size), (groups, keys), value_size = query.shape, key.shape[1:3], value.shape[3]
    kind, others = query.dtype, [key, value, *(one for one in (mask, sinks) if one is not None)]
    if not 0 < batch * rows <= most_rows or not _suits(query) or library() is None:
        return None
    if size % LANES or value_size % LANES or max(size, value_size) > MOST_HEAD or heads % groups:
        return None
    if any(one.dtype is not kind or not one.is_cpu or (one.dim() == 4 and one.stride(3) != 1) for one in others):
        return None
    mask_batch = mask_row = 0
    if mask is not None:
        if mask.shape[1:] != (1, rows, keys) or mask.shape[0] not in (1, batch):
            return None
        mask_batch, mask_row = mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2)
    query, out = query.contiguous(), torch.empty(batch, rows, heads, value_size, dtype=kind)
    parts = 1
    if batch * heads * rows * keys * size >= WORTH_THREADS and has_threads():
        parts = min(torch.get_num_threads(), batch * groups * -(-heads // groups * rows // SHARED_ROWS))
    scores = torch.empty(parts * SHARED_ROWS * -(-keys // LANES) * LANES)
    pointers = [None if one is None else one.data_ptr() for one in (query, key, value, mask, sinks, out, scores)]
    _kernel("attend", NAMES[kind])(
        *pointers, batch, heads, groups, rows, keys, size, value_size, *key.stride()[:3], *value.stride()[:3],
        mask_batch, mask_row, parts, scale, softcap or 0.0,
    )  # fmt: skip
    return out


# -- products of few rows by a weight ----------------------------------------------------------------------------------


def can_multiply(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether `multiply` takes weights of this shape here."""
    return dtype in NAMES and outputs % LANES == 0 and inputs * dtype.itemsize % 4 == 0 and library() is not None


def pack(weight: Tensor) -> Tensor:
    """weight (C, X) in the order in which `multiply` reads it."""
    weight = weight.detach().contiguous()
    out, (outputs, inputs) = torch.empty_like(weight), weight.shape
    _kernel("pack", NAMES[weight.dtype])(weight.data_ptr(), out.data_ptr(), inputs, outputs, _threads_for(weight))
    return out


def multiply(states: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """states (.., X) by a weight (C, X) that `pack` has made, plus bias (C,): (.., C). A row's bits do not depend on
    the number of rows."""
    outputs, inputs = packed.shape
    out, rows = torch.empty(*states.shape[:-1], outputs, dtype=packed.dtype), states.numel() // inputs
    stride = inputs if rows < FEW_ROWS else apart(inputs, packed.dtype)
    states = F.pad(states.reshape(rows, inputs), (0, stride - inputs)) if stride > inputs else states.contiguous()
    _kernel("multiply", NAMES[packed.dtype])(
        states.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, stride, inputs, outputs, _threads_for(packed),
    )  # fmt: skip
    return out


def apart(numbers: int, dtype: torch.dtype) -> int:
    """APART of vectors.h."""
    return numbers if numbers * dtype.itemsize % 2048 else numbers + 64 // dtype.itemsize


def _threads_for(weight: Tensor) -> int:
    return max(1, min(_threads(), weight.nbytes // BYTES_OF_A_THREAD))


# -- a decoder layer but for its attention -----------------------------------------------------------------------------


class Layer(ctypes.Structure):
    """`layer` of native.c: what there is, by pointers that others keep alive."""

    _fields_: ClassVar = [
        (name, kind)
        for kind, names in (
            (POINTER, "in_norm query_norm key_norm mixed_norm mlp_norm out_norm"),
            (POINTER, "qkv qkv_bias mix mix_bias gate_up gate_up_bias down down_bias"),
            (NUMBER, "hidden heads groups size inner one_more turned_first gelu"),
            (REAL, "eps residual"),
        )
        for name in names.split()
    ]


def before_attention(
    layer: Any, states: Tensor, cos: Tensor, sin: Tensor, batch: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """states (B * S, H), cos and sin (B, S, d), all contiguous -> query (B, h, S, d), key and value (B, g, S, d)."""
    kind, heads, groups, size = states.dtype, layer.heads, layer.groups, layer.size
    query, key = torch.empty(batch, heads, rows, size, dtype=kind), torch.empty(batch, groups, rows, size, dtype=kind)
    value = torch.empty_like(key)
    room = torch.empty(batch * rows * (apart(layer.hidden, kind) + (heads + 2 * groups) * size), dtype=kind)
    pointers = [one.data_ptr() for one in (states, cos, sin, query, key, value, room)]
    _kernel("before", NAMES[kind])(ctypes.byref(layer), *pointers, batch, rows, _threads())
    return query, key, value


def behind_attention(layer: Any, states: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """states (R, H) and the attention's result (R, h * d), both contiguous -> the layer's result (R, H); where it has
    no gated product here the sum of states and attention, and beside it that sum's norm."""
    rows, kind, hidden, inner, width = len(states), states.dtype, layer.hidden, layer.inner, layer.heads * layer.size
    out, normed = torch.empty_like(states), states if layer.gate_up else torch.empty_like(states)
    a_row = 2 * (hidden + inner) + apart(hidden, kind) + apart(inner, kind) + apart(width, kind)
    room = torch.empty(rows * a_row, dtype=kind)
    pointers = [one.data_ptr() for one in (states, mixed, out, normed, room)]
    _kernel("behind", NAMES[kind])(ctypes.byref(layer), *pointers, rows, _threads())
    return out, normed


def _threads() -> int:
    return torch.get_num_threads() if has_threads() else 1


@functools.cache
def _kernel(operation: str, kind: str) -> Any:
    operations = library()
    assert operations is not None, "asked for by those who have found it"
    return getattr(operations, f"{operation}_{kind}")


def _suits(states: Tensor) -> bool:
    """Plain numbers on a CPU, without gradient."""
    plain = type(states) is Tensor and states.device.type == "cpu" and states.dtype in NAMES
    return plain and not torch.is_grad_enabled()
