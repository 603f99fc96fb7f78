"""Where a result came from: command, versions, hardware, commit, resolved config. Written beside every output.

No document keeps a secret: `collect` and `write_json` take them out (`redaction`).
"""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fledge
from fledge.outputs import write_json
from fledge.redaction import redacted

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "vllm", "ray")


def versions() -> dict[str, str]:
    """Installed versions of what can change a result; packages that are absent are left out."""
    found = {"fledge": fledge.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the source tree fledge runs from (`+changes` when it is dirty); None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory and GPUs of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": processor(), "cores": cores, "torch_threads": torch.get_num_threads(), "gpus": gpus}


def processor() -> str:
    """The CPU model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def costs_key(*models: Any) -> str:
    """What measured times and the last bits of sums depend on: this machine, PyTorch, the kinds of these models and the
    shapes of their weights."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for model in models:
        digest.update(type(model).__name__.encode())
        for parameter in model.parameters():
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
    waiting = " that wait asleep" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else ""
    return f"{processor()}, {torch.get_num_threads()} threads{waiting}, torch {torch.__version__}, {digest.hexdigest()}"


def collect(config: Any = None) -> dict[str, Any]:
    """Everything above as one JSON-ready dict without secrets; `config` is a dataclass or a dict."""
    facts = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "config": config,
    }
    return redacted(facts)


def write(path: Path, config: Any = None, **more: Any) -> None:
    """Write `collect(config)` and any further facts to `path` as JSON, atomically."""
    write_json(path, {**collect(config), **more})
