"""Run code that a model wrote, in a process that can do little harm.

A separate interpreter in an empty folder: no inherited environment, limits on CPU time, memory, file size and
processes, its own session (killed as a whole at the time limit) and, where the kernel lets us, no network. That is
protection against accidents, not against an attacker: it is off unless `--run-code` asks for it.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile

TIME_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 1 << 30
FILE_LIMIT_BYTES = 1 << 20
PASSED = "all tests passed"
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000


def passes_tests(code: str, check: dict[str, str], *, time_limit_s: float = TIME_LIMIT_S) -> bool:
    """Whether `code` passes `check["test"]`, HumanEval's `check(candidate)`, for the function it names."""
    program = f"{code}\n\n{check['test']}\n\ncheck({check['entry_point']})\nprint({PASSED!r})\n"
    with tempfile.TemporaryDirectory(prefix="fledge-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program], cwd=folder, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=lambda: _restrict(time_limit_s),
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_session(process)
    return process.returncode == 0 and output.decode(errors="replace").rstrip().endswith(PASSED)


def _restrict(time_limit_s: float) -> None:
    """In the child, before the interpreter starts."""
    seconds = int(time_limit_s) + 1
    limits = (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_FSIZE, FILE_LIMIT_BYTES),
        (resource.RLIMIT_CORE, 0),
    )
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))
    unshare = getattr(os, "unshare", None)  # Python 3.12
    if unshare:
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNET)
        except OSError:
            return  # containers often forbid it


def _kill_session(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
