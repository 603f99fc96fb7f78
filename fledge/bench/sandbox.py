"""Run code that a model wrote, and its unit tests, apart from this machine and from each other.

Two processes, each in a bubblewrap sandbox of its own (`bwrap`): one has the code, the other the tests. The tests call
the function through a pipe (`sandbox_program.py`) and get values back as plain data; the exit status of the tests is
the verdict. So the code can only give answers: it never sees the tests, and nothing that it prints, patches or exits
with reaches the verdict. Each sandbox has no network, no environment, no /proc, its own /tmp of 16 MiB and, read-only,
/usr and the Python that runs us. It ends with us, or at the time limit, with everything that it started.

Not promised: values are passed by copy, so tests cannot see that an argument was changed; code that needs more than the
standard library fails; a program may pass if it guesses what the tests want from their arguments. The kernel is shared:
a fault in it is a way out. Memory is limited per process, shared memory only by the time limit.
`isolation="none"` runs the same two processes with nothing around them but limits.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from fledge.bench.sandbox_program import FAILED, NO_CODE_PROCESS, PASSED
from fledge.errors import UserError

Isolation = Literal["bwrap", "none"]
PROGRAM = Path(__file__).with_name("sandbox_program.py")
TIME_LIMIT_S = 10.0
PROBE_TIME_LIMIT_S = 60.0
NOBODY = "65534"
TMP_BYTES = "16777216"
LIMITS = {"RLIMIT_AS": 512 << 20, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
PROCESS_LIMIT = 4  # in each sandbox, threads included
INSTALL = "Install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
OTHERWISE = "or give --run-code-unsandboxed to run the code with nothing around it"


def passes_tests(
    code: str, check: dict[str, str], *, isolation: Isolation = "bwrap", time_limit_s: float = TIME_LIMIT_S
) -> bool:
    """Whether `code` passes `check["test"]`, HumanEval's `check(candidate)`, for the function it names."""
    jobs = {"code": {"code": code, "entry_point": check["entry_point"]}, "tests": check}
    with (
        tempfile.TemporaryDirectory(prefix="fledge-code-") as folder,
        _started("code", jobs["code"], isolation, time_limit_s, folder) as answering,
        _started(
            "tests", jobs["tests"], isolation, time_limit_s, folder, stdin=answering.stdout, stdout=answering.stdin
        ) as testing,
    ):
        for pipe in (answering.stdin, answering.stdout):
            assert pipe is not None
            pipe.close()  # only the two processes hold the pipes now: each sees when the other has ended
        try:
            status = testing.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            return False
    if status not in (PASSED, FAILED):
        what = "the code's process did not start" if status == NO_CODE_PROCESS else f"they ended with status {status}"
        raise UserError(f"the unit tests of {check['entry_point']!r} did not run to their end: {what}.")
    return status == PASSED


def refuse_without_sandbox() -> None:
    """A UserError that says what to install where code cannot be sandboxed here."""
    problem = sandbox_problem()
    if problem:
        raise UserError(f"--run-code runs a model's code in a sandbox, and {problem}, {OTHERWISE}.")


@functools.cache
def sandbox_problem() -> str | None:
    """Why there is no sandbox here; None when there is one (a program was run in it)."""
    for program in ("bwrap", "setpriv")[: 2 if _is_root() else 1]:
        if not shutil.which(program):
            package = INSTALL if program == "bwrap" else "Install util-linux"
            return f"{program} was not found. {package}"
    try:
        probe = subprocess.run(
            [*_sandbox(), *_python("pass")], capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace",
            timeout=PROBE_TIME_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"bwrap did not start a program within {PROBE_TIME_LIMIT_S:.0f} s here. Try again on an idle machine"
    if probe.returncode == 0:
        return None
    found = " ".join(probe.stderr.split())[:300] or f"status {probe.returncode}"
    return f"bwrap fails here ({found}). It needs bubblewrap 0.8 and a kernel that allows user namespaces: allow them"


@contextlib.contextmanager
def _started(
    role: str, job: dict[str, Any], isolation: Isolation, time_limit_s: float, folder: str,
    stdin: IO[bytes] | int | None = subprocess.PIPE, stdout: IO[bytes] | int | None = subprocess.PIPE,
) -> Iterator[subprocess.Popen]:  # fmt: skip
    """One of the two processes. It is killed, with everything it started, at the end of the block."""
    limits = {**LIMITS, "RLIMIT_CPU": int(time_limit_s) + 1}
    if isolation == "bwrap":  # elsewhere the limit would count all processes of the user
        limits["RLIMIT_NPROC"] = PROCESS_LIMIT
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps({**job, "limits": limits}).encode())
        file.seek(0)
        process = subprocess.Popen(
            [*(_sandbox() if isolation == "bwrap" else []), *_python(PROGRAM.read_text(), role, str(file.fileno()))],
            cwd=folder, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, stdin=stdin, stdout=stdout,
            stderr=subprocess.DEVNULL, start_new_session=True, pass_fds=(file.fileno(),),
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _python(source: str, *words: str) -> list[str]:
    """The interpreter that runs us, outside its virtual environment and without site-packages."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", source, *words]


def _sandbox() -> list[str]:
    """The command that runs the words after it in a sandbox.

    Limits on processes do not bind root, not even in a user namespace. So root first becomes nobody, in an outer bwrap
    that shows nobody the interpreter, wherever root keeps it.
    """
    inner = [
        "bwrap", "--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc",
        "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv",
        "--size", TMP_BYTES, "--tmpfs", "/tmp", *_system(), "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip
    if not _is_root():
        return inner
    outer = ["bwrap", "--unshare-pid", "--die-with-parent", "--tmpfs", "/tmp", *_system(), "--bind", "/proc", "/proc"]
    return [*outer, "--", "setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--", *inner]


def _system() -> list[str]:
    """Flags that show /usr and the interpreter, read-only, and the harmless devices."""
    flags = ["--ro-bind", "/usr", "/usr"]
    flags += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            flags += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            flags += ["--ro-bind", str(path), str(path)]
    python = Path(sys.base_prefix).resolve()
    if not python.is_relative_to("/usr"):
        for parent in reversed(python.parents[:-1]):
            flags += ["--dir", str(parent)]  # bwrap would make it readable for its owner only
        flags += ["--ro-bind", str(python), str(python)]
        packages = Path(sysconfig.get_path("stdlib"), "site-packages").resolve()
        if packages.is_dir():
            flags += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    return [*flags, "--dev", "/dev", "--remount-ro", "/dev"]


def _is_root() -> bool:
    return os.geteuid() == 0
