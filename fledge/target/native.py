"""Small operations of a decoding step on a CPU, compiled from `native.c` where a C compiler is there.

transformers writes norms and rotary embeddings out as chains of eight and eighteen operations. Each of them costs
microseconds to begin, whatever it computes, and a step has a thousand. A call of `native.c` costs one beginning. It
rounds where the chain does, so the result is the same to the last bit of a sum's order. Compiled in half a second, once
per machine and source, into the user's cache folder. Without a compiler nothing changes.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fledge import provenance
from fledge.outputs import cache_folder

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
MOST_ROWS = 64  # with more, PyTorch's threads are worth more
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_long


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operations; None where there is no compiler or nothing that it makes can be loaded."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    facts = [SOURCE.read_text(), *FLAGS, provenance.processor(), compiler or ""]
    path = cache_folder("native") / f"{hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()}.so"
    try:
        if not path.is_file():
            if compiler is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            building = path.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler, "-x", "c", *FLAGS, "-o", str(building), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            os.replace(building, path)
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for name in NAMES.values():
        getattr(found, f"rms_norm_{name}").argtypes = [POINTER] * 3 + [NUMBER] * 2 + [ctypes.c_float]
        getattr(found, f"rope_{name}").argtypes = [POINTER] * 4 + [NUMBER] * 7
    return found


def rms_norm(states: Tensor, weight: Tensor, eps: float, most_rows: int = MOST_ROWS) -> Tensor | None:
    """(.., H) scaled to RMS 1 and by `weight` (H,); None where PyTorch should do it."""
    size = weight.shape[0]
    rows = states.numel() // size
    if states.dtype is not weight.dtype or not 0 < rows <= most_rows or not _suits(states):
        return None
    operations = library()
    assert operations is not None, "asked for by those who have found it"
    states, out = states.contiguous(), torch.empty(states.shape, dtype=states.dtype)
    kernel = getattr(operations, f"rms_norm_{NAMES[states.dtype]}")
    kernel(states.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, eps)
    return out


def rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Rotary embedding, half-split layout: states (B, h, S, d), cos and sin (B, S, d); None where PyTorch should."""
    batch, heads, rows, size = states.shape
    alike = cos.shape == sin.shape == (batch, rows, size) and cos.dtype is sin.dtype is states.dtype
    if not alike or not 0 < batch * rows <= MOST_ROWS or states.stride(3) != 1 or size % 2 or not _suits(states):
        return None
    operations = library()
    assert operations is not None, "asked for by those who have found it"
    cos, sin, out = cos.contiguous(), sin.contiguous(), torch.empty(states.shape, dtype=states.dtype)
    kernel = getattr(operations, f"rope_{NAMES[states.dtype]}")
    pointers = (states.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    kernel(*pointers, batch, heads, rows, size, *states.stride()[:3])
    return out


def _suits(states: Tensor) -> bool:
    """Plain numbers on a CPU, without gradient."""
    plain = type(states) is Tensor and states.device.type == "cpu" and states.dtype in NAMES
    return plain and not torch.is_grad_enabled()
