"""What a machine has of what fledge needs, a line each: Python, packages, torch, compiler, GPU, disk, ports, hub.

A line is `ok`, a `note` (something is slower or not possible here) or `broken` (commands will fail). Nothing waits for
the network longer than `PATIENCE_S`.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

import fledge
from fledge.errors import free_bytes
from fledge.offline import hub_host
from fledge.outputs import cache_folder

PATIENCE_S = 1.5
PORTS = range(6000, 6008)  # where `fledge serve` listens and `fledge regenerate` looks
LITTLE_DISK_GIB, LITTLE_MEMORY_GIB = 10, 4
TESTED = Path(fledge.__file__).parents[1] / "constraints.txt"  # in a checkout


@dataclass(frozen=True)
class Found:
    """One line."""

    state: Literal["ok", "note", "broken"]
    what: str
    text: str


def examine() -> Iterator[Found]:
    """All lines, each as soon as it is known. What a check itself cannot bear is a broken line."""
    checks: list[Callable[[], Found]] = [
        python, packages, tested, torch_works, compiler, memory, gpus, disk, ports, hub,
    ]  # fmt: skip
    for check in checks:
        try:
            yield check()
        except Exception as error:  # a package that cannot be imported, a driver that fails: that is the finding
            yield Found("broken", check.__name__.partition("_")[0], f"{type(error).__name__}: {error}")


def python() -> Found:
    needed = "3.11"
    state: Literal["ok", "broken"] = "ok" if Version(platform.python_version()) >= Version(needed) else "broken"
    return Found(state, "python", f"{platform.python_version()} ({sys.executable}), at least {needed} is needed")


def packages() -> Found:
    """The installed versions beside the ranges that fledge declares."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("fledge") or []]
    except importlib.metadata.PackageNotFoundError:
        return Found("note", "packages", "fledge is run from its sources and not installed: no ranges to compare with")
    wrong = []
    for requirement in declared:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = version_of(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} is {found or 'missing'}, needed {requirement.specifier}")
    if wrong:
        return Found("broken", "packages", f"{'; '.join(wrong)}. Install fledge again: pip install -e .")
    return Found("ok", "packages", f"fledge {fledge.__version__}, and all that it needs is installed in its range")


def tested() -> Found:
    """The versions beside those that the tests run with."""
    if not TESTED.is_file():
        return Found("ok", "tested", "no constraints.txt beside this installation: versions are only held to ranges")
    pins = dict(line.split("==") for line in TESTED.read_text().splitlines() if "==" in line and line[0] != "#")
    differ = []
    for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors"):
        if (found := version_of(name)) is not None and Version(found).public != pins[name]:
            differ.append(f"{name} {found} (tested {pins[name]})")
    return Found("note" if differ else "ok", "tested", ", ".join(differ) or "the versions are those of constraints.txt")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_works() -> Found:
    import torch

    from fledge.target.linear import multiplies_bf16

    assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 1), torch.full((2, 1), 3.0)), "a product is wrong"
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    cpu = torch.backends.cpu.get_cpu_capability() + ("" if multiplies_bf16() else ", training on it is in fp32")
    return Found("ok", "torch", f"{torch.__version__} ({build} build), {torch.get_num_threads()} threads, {cpu}")


def compiler() -> Found:
    from fledge.target.native import library

    if library() is None:
        return Found("note", "compiler", "no C compiler that works: decoding on a CPU is slower. Install gcc or clang")
    return Found("ok", "compiler", "a C compiler is there and what it makes runs")


def memory() -> Found:
    import psutil

    room = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{room.available >> 30} of {room.total >> 30} GiB free, {cores} cores"
    return Found("note" if room.available >> 30 < LITTLE_MEMORY_GIB else "ok", "memory", text)


def gpus() -> Found:
    """Those that torch can use, beside those that the driver shows."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if found:
        names = ", ".join(f"{one.name} ({one.total_memory >> 30} GiB)" for one in found)
        return Found("ok", "gpu", names)
    if torch.accelerator.is_available():
        return Found("ok", "gpu", str(torch.accelerator.current_accelerator()))
    if shutil.which("nvidia-smi") and (shown := driver_shows()):
        return Found("note", "gpu", f"the driver shows {shown}, and this torch cannot use it. Install a CUDA build of "
                     f"torch that this driver runs, and look at CUDA_VISIBLE_DEVICES")  # fmt: skip
    return Found("ok", "gpu", "none: everything runs on the CPU")


def driver_shows() -> str:
    """What nvidia-smi lists, on one line; empty where it fails."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""


def disk() -> Found:
    """The folders that every command writes to."""
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = cache_folder("tokens").parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache) as file:
        file.write(bytes(1 << 16))
    rooms = {folder: free_bytes(folder) >> 30 for folder in (Path.cwd(), cache, hub)}
    text = ", ".join(f"{folder}: {gib} GiB free" for folder, gib in rooms.items())
    return Found("note" if min(rooms.values()) < LITTLE_DISK_GIB else "ok", "disk", text)


def ports() -> Found:
    """Whether `fledge serve` finds its ports free."""
    used = [port for port in PORTS if answers("127.0.0.1", port, 0.1)]
    if used:
        listening = ", ".join(map(str, used))
        return Found("note", "ports", f"something listens on {listening}: servers, or take another --base-port")
    return Found("ok", "ports", f"{PORTS[0]} to {PORTS[-1]} are free for `fledge serve`")


def hub() -> Found:
    host = hub_host()
    if host is None:
        return Found("ok", "hub", "asked through a proxy or not at all (HF_HUB_OFFLINE, http_proxy)")
    if answers(host, 443, PATIENCE_S):
        return Found("ok", "hub", f"{host} answers")
    return Found("note", "hub", f"{host} is not reachable: models and data sets must be folders here or in its cache")


def answers(host: str, port: int, patience_s: float) -> bool:
    """Whether a connection is taken in time. Asked in a thread: looking a name up waits as long as the system likes."""
    taken = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=patience_s).close()
            taken.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience_s)
    return taken.is_set()
