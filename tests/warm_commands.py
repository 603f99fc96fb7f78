"""`fledge` for tests that type commands into a shell: each is a fork of one process that has imported everything.

    with WarmCommands(FOLDER) as path:      # to be put first in PATH
        subprocess.run(["bash", "-c", "fledge ..."], env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"})

Starting Python and importing torch and transformers takes eight seconds of a core, which a page of ten commands paid
ten times. Words, working folder, environment, the three streams, signals and the exit status are the shell's. Where the
first word is a Python file, it is run. As a script this is the process that forks.
"""

import array
import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -SE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(asked)
pid = int.from_bytes(server.recv(8), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = server.recv(1)
sys.exit(status[0] if status else 1)
"""

PYTHON = """#!/bin/sh
if [ "$1" = -m ] && [ "$2" = fledge ]; then shift 2; exec "{program}" "$@"; fi
exec "{python}" "$@"
"""


class WarmCommands:
    """The process that forks, and the programs that ask it: `fledge`, and a `python3` whose `-m fledge` is the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, program = self.folder / "socket", self.folder / "fledge"
        program.write_text(CLIENT.format(python=sys.executable, path=str(path)))
        python = self.folder / "python3"
        python.write_text(PYTHON.format(python=sys.executable, program=program))
        for one in (program, python):
            one.chmod(0o755)
        self._process = subprocess.Popen([sys.executable, __file__, str(path)])
        while not path.exists():
            assert self._process.poll() is None, "the process that forks has ended"
            time.sleep(0.05)
        return self.folder

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()


def serve(path: Path) -> None:
    """Fork for every connection."""
    import fledge.bench.engine
    import fledge.bench.run
    import fledge.commands.regenerate
    import fledge.export.convert
    import fledge.extraction.extract
    import fledge.regeneration.local_engine
    import fledge.train.run  # noqa: F401
    from fledge.target import native

    native.library()  # compiled once for all
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(answer(connection))
        connection.close()


def answer(connection: socket.socket) -> int:
    """Run the command that is asked for, as if it were started by who asks."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = array.array("i")
    size, sent, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(sent[0][2])
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += connection.recv(1 << 20)
    words, folder, environment = json.loads(asked)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if (pid := os.fork()) == 0:  # of its own: it may leave without a word
        connection.close()
        os._exit(ended(words))
    connection.sendall(pid.to_bytes(8, "big"))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 128 - status if status < 0 else status
    connection.sendall(bytes([status]))
    return status


def ended(words: list[str]) -> int:
    """The exit status of a command."""
    from fledge.cli import main

    script = words[0] if words and words[0].endswith(".py") else None
    sys.argv = words if script else ["fledge", *words]
    status: Any = 0
    try:
        if script:
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        else:
            main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
