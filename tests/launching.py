"""Scripts and commands in processes of their own: forks of one that has imported everything, or under torchrun."""

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE, CompletedProcess

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted ranks read addresses of the dead (docs/scaling.md)
}  # fmt: skip


class Launch:
    """Runs a Python file, or a command of fledge, with these words, once for each rank."""

    def __init__(self, warm_path: str) -> None:
        self._program = shutil.which("fledge", path=warm_path)

    def __call__(self, words: list, *, ranks: int = 1, check: bool = True, timeout_s: float = 280) -> CompletedProcess:
        command, environment = [str(self._program), *map(str, words)], {**os.environ, **ENVIRONMENT}
        ids: list[dict[str, str]] = [{}]
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            ids = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        running = [
            subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env={**environment, **own}) for own in ids
        ]
        with ThreadPoolExecutor(ranks) as pool:  # no pipe may fill up
            said = list(pool.map(lambda process: process.communicate(timeout=timeout_s), running))
        status = max(process.returncode for process in running)
        done = CompletedProcess(command, status, *("".join(parts) for parts in zip(*said, strict=True)))
        assert not check or status == 0, done.stderr[-3000:]
        return done


def torchrun(words: list, *, ranks: int, restarts: int = 0) -> CompletedProcess:
    """The same as users do it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
        "--monitor-interval", "0.2", *map(str, words),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=280)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
