"""vLLM servers of the target, one per group of GPUs. The only file that knows vLLM's command line.

Starts `vllm serve` as a program, so vLLM may live in a virtual environment of its own (--vllm, or the variable VLLM).
Server i listens on base_port + i and logs to its own file; all of them live and die together.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from fledge.console import progress, say, show_table
from fledge.errors import UserError, naming
from fledge.http_client import Limits, ServerError, get
from fledge.parsing import read_json
from fledge.ranges import Count, Port
from fledge.servers.settings import SpeculationSettings
from fledge.target.settings import TargetSettings

POLL_S = 0.5
START_TIMEOUT_S = 3600.0  # a large target's weights from a slow disk
STOP_PATIENCE_S = 20.0
LOG_HEADING = "--- fledge serve, "
LOG_TAIL_LINES = 12
PROBE = Limits(total_s=5.0, body_bytes=1 << 20)
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
CPU_CACHE_MOST_GIB = 16
CPU_CORES = "VLLM_CPU_OMP_THREADS_BIND"
GPU_NAME = re.compile(r"(GPU|MIG)-[\w/-]+$")
# What a draft's config.json calls itself -> vLLM's method
BLOCK_METHODS = {
    "DFlashDraftModel": "dflash", "dflash": "dflash", "Qwen3DSparkModel": "dspark", "dspark": "dspark",
}  # fmt: skip
FEW_CORES = 4  # of a server: too few to keep one for its scheduler, as vLLM does


@dataclass(frozen=True, kw_only=True)
class ServerSettings(TargetSettings, SpeculationSettings):
    """Servers of one target."""

    target: str
    """The target: a folder or hub name. It is served under this name unless `-- --served-model-name` says otherwise."""
    num_servers: Count | None = None
    """Servers to start. None: as many as the GPUs make groups of --tensor-parallel-size; one without GPUs."""
    tensor_parallel_size: Count = 1
    """GPUs per server."""
    gpus: str | None = None
    """GPUs to use, as in CUDA_VISIBLE_DEVICES ("0,1,2,3"); "": none. None: all visible ones."""
    base_port: Port = 6000
    """Server i listens on base_port + i."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    max_model_len: Count | None = None
    """Longest prompt and answer together. None: what the model allows."""
    draft: str | None = None
    """EAGLE-3 head to decode with (an exported folder or hub name)."""
    output_dir: Path = Path("outputs/serve")
    """Folder of the servers' logs."""
    vllm: str = dataclasses.field(default_factory=lambda: os.environ.get("VLLM") or "vllm")
    """The vllm program; a path when it lives in another virtual environment. Default: the variable VLLM."""
    vllm_args: tuple[str, ...] = ()
    """Arguments for vLLM as they are."""


@dataclass(frozen=True)
class Server:
    """One server: how it is started, where it answers and logs. `gpus` is empty on a machine without any."""

    command: tuple[str, ...]
    port: int
    gpus: str
    log: Path
    host: str
    on_cpu: Mapping[str, str] = dataclasses.field(default_factory=dict)  # variables, where the user has not set them

    @property
    def environment(self) -> dict[str, str]:
        """What it is started with beside this process's own variables."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": self.gpus}
        return {name: value for name, value in self.on_cpu.items() if name not in os.environ}

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"

    def shell_line(self) -> str:
        where = "".join(f"{name}={value} " for name, value in self.environment.items())
        return f"{where}{shlex.join(self.command)} >> {shlex.quote(str(self.log))} 2>&1 &"


def keep_running(settings: ServerSettings, servers: Sequence[Server]) -> None:
    """Start these servers and watch them until Ctrl-C; the end of one ends all."""
    with running(servers) as processes:
        show_table(
            f"{settings.target}: {len(servers)} server{'s' * (len(servers) > 1)} ready. Ctrl-C stops all.",
            ("URL", "GPUs", "log"),
            [(f"{server.url}/v1", server.gpus or "none (CPU)", server.log) for server in servers],
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                check_alive(servers, processes)
                time.sleep(POLL_S)
    say("all servers are stopped")


def plan(settings: ServerSettings, gpus: Sequence[str]) -> list[Server]:
    """The servers these settings ask for, on these GPUs."""
    size = settings.tensor_parallel_size
    count = settings.num_servers if settings.num_servers is not None else max(len(gpus) // size, 1)
    if size < 1 or count < 1:
        raise UserError(f"--tensor-parallel-size is {size} and --num-servers {count}; both must be at least 1.")
    if gpus and count * size > len(gpus):
        raise UserError(
            f"{count} servers of {size} GPUs need {count * size} GPUs, {len(gpus)} are visible ({','.join(gpus)}). "
            "Lower --num-servers or --tensor-parallel-size."
        )
    on_cpu = [{}] * count if gpus else cpu_environments(settings.vllm, count, size)
    return [
        Server(
            command=_command(settings, settings.base_port + index),
            port=settings.base_port + index,
            gpus=",".join(gpus[index * size : (index + 1) * size]),
            log=settings.output_dir / f"server-{settings.base_port + index}.log",
            host=settings.host,
            on_cpu=on_cpu[index],
        )
        for index in range(count)
    ]


def cpu_environments(program: str, num_servers: int, ranks: int) -> list[dict[str, str]]:
    """Variables of servers without GPUs: each its part of memory and cores; Intel's OpenMP where vLLM brought it."""
    common = {CPU_CACHE: str(cpu_cache_gib(num_servers))}
    # vLLM 0.32 warns of a "significant performance loss" without it, yet does not load it
    openmp = Path(shutil.which(program) or program).absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file() and not {" ", ":"} & set(str(openmp)):
        common["LD_PRELOAD"] = str(openmp)
    parts = core_parts(physical_cores(), num_servers * ranks)
    if not parts or (num_servers == 1 and len(parts[0]) > FEW_CORES):
        return [common] * num_servers  # vLLM's own choice, which looks at NUMA nodes
    lists = [",".join(map(str, part[:-1] if len(part) > FEW_CORES else part)) for part in parts]
    return [common | {CPU_CORES: "|".join(lists[i * ranks : (i + 1) * ranks])} for i in range(num_servers)]


def cpu_cache_gib(num_servers: int) -> int:
    """Cache of each server without a GPU: vLLM 0.32 would take nearly all memory; a quarter of it is shared."""
    return max(1, min(CPU_CACHE_MOST_GIB, psutil.virtual_memory().available // 4 // num_servers >> 30))


def core_parts(cores: Sequence[int], num_parts: int) -> list[Sequence[int]]:
    """The cores in equal parts, neighbours together (vLLM 0.32 gives all servers the same ones); [] if too few."""
    each = len(cores) // num_parts
    return [cores[i * each : (i + 1) * each] for i in range(num_parts)] if each else []


def physical_cores() -> list[int]:
    """One CPU of each core that this process may use; [] where the system does not say."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    core = {file.read_text() if file.is_file() else str(cpu): cpu for cpu, file in zip(allowed, siblings, strict=True)}
    return sorted(core.values())


def _command(settings: ServerSettings, port: int) -> tuple[str, ...]:
    words = [settings.vllm, "serve", settings.target, "--host", settings.host, "--port", str(port)]
    if settings.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    if settings.draft:
        words += ["--speculative-config", speculative_config(settings.draft, settings.num_speculative_tokens)]
    return (*words, *settings.vllm_args)


def speculative_config(draft: str, num_speculative_tokens: int) -> str:
    """vLLM's JSON for a head; without the method vLLM 0.32 crashes."""
    method = speculative_method(Path(draft))
    return json.dumps({"method": method, "model": draft, "num_speculative_tokens": num_speculative_tokens})


def speculative_method(draft: Path) -> str:
    """vLLM's name of what drafts, by the folder's config.json: EAGLE-3 unless it says a block draft."""
    path = draft / "config.json"
    document = read_json(path, dict[str, Any]) if path.is_file() else {}
    names = {*(document.get("architectures") or ()), document.get("speculators_model_type")}
    return next((method for name, method in BLOCK_METHODS.items() if name in names), "eagle3")


def visible_gpus(chosen: str | None) -> list[str]:
    """Names of the GPUs to use; [] on a machine without."""
    if chosen:
        return chosen_gpus(chosen)
    listed = chosen if chosen is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    found = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def chosen_gpus(text: str) -> list[str]:
    """The GPUs of --gpus: numbers, or names as `nvidia-smi -L` shows them, each once."""
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or not all(name.isdecimal() or GPU_NAME.match(name) for name in names):
        raise UserError(
            f'--gpus {text}: no list of different GPUs. Give numbers ("0,1,2,3") or names of nvidia-smi -L.'
        )
    return names


@contextlib.contextmanager
def running(
    servers: Sequence[Server], start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[list[subprocess.Popen[Any]]]:
    """The servers, answering, for as long as the block lasts; stopped on the way out, however that happens."""
    program = servers[0].command[0]
    if not shutil.which(program):
        raise UserError(f"{program}: no such program. Install vLLM, or give its path with --vllm or the variable VLLM.")
    for server in servers:
        _check_port(server)
    processes: list[subprocess.Popen[Any]] = []
    logs: list[IO[bytes]] = []
    with _signals_as_interrupt():
        try:
            for server in servers:
                server.log.parent.mkdir(parents=True, exist_ok=True)
                with naming(server.log):
                    logs.append(open(server.log, "ab", buffering=0))
                    logs[-1].write(f"{LOG_HEADING}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                processes.append(
                    subprocess.Popen(
                        server.command, stdin=subprocess.DEVNULL, stdout=logs[-1], stderr=subprocess.STDOUT,
                        env={**os.environ, **server.environment}, start_new_session=True,
                    )
                )  # fmt: skip
            _wait_until_ready(servers, processes, start_timeout_s)
            yield processes
        finally:
            stop(processes)
            for log in logs:
                log.close()


def check_alive(servers: Sequence[Server], processes: Sequence[subprocess.Popen[Any]]) -> None:
    """A UserError with the end of the log when a server has died."""
    for server, process in zip(servers, processes, strict=True):
        if process.poll() is not None:
            raise UserError(
                f"the server on port {server.port} ended with status {process.returncode}; all are stopped. "
                f"The last lines of {server.log}: {tail(server.log)}"
            )


def stop(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """End the servers and what they started: asked first, killed after a while."""
    for sign, patience in ((signal.SIGTERM, STOP_PATIENCE_S), (signal.SIGKILL, 5.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        end = time.monotonic() + patience
        while any(_group_lives(process) for process in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        else:
            return


def _group_lives(process: subprocess.Popen[Any]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The end of what the last start logged, on one line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    text = text.rpartition(LOG_HEADING)[2].partition("\n")[2]  # of this start, not of earlier ones
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip()) or "(empty)"


def _wait_until_ready(servers: Sequence[Server], processes: Sequence[subprocess.Popen[Any]], timeout_s: float) -> None:
    waiting, end = list(servers), time.monotonic() + timeout_s
    with progress("servers ready", len(servers)) as bar:
        while waiting:
            check_alive(servers, processes)
            for server in [server for server in waiting if _answers(server)]:
                waiting.remove(server)
                bar.advance(1)
            if waiting and time.monotonic() > end:
                raise UserError(
                    f"the server on port {waiting[0].port} does not answer after {timeout_s:.0f} s. "
                    f"The last lines of {waiting[0].log}: {tail(waiting[0].log)}"
                )
            bar.advance(0)
            time.sleep(POLL_S if waiting else 0)


def _answers(server: Server) -> bool:
    try:
        return get(f"{server.url}/health", limits=PROBE).status == 200
    except ServerError:
        return False


def _check_port(server: Server) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            raise UserError(
                f"port {server.port} on {server.host} cannot be used ({error.strerror}). "
                "Stop what listens there, or choose another --base-port."
            ) from None


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal stop the servers as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
