"""What runs inside the two sandboxes of `sandbox.py`: a model's code, and the unit tests that call it.

    python -I -S -c SOURCE code JOB     runs the code, then answers calls of its function
    python -I -S -c SOURCE tests JOB    runs the tests; `check(candidate)` gets a stand-in that asks the other process

JOB is a file descriptor with the program texts and limits as JSON. stdin and stdout carry one JSON line per call and
reply. Values are copied as data: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict.
Only the standard library is imported, because the sandbox has nothing else.
"""

import builtins
import json
import os
import resource
import sys
import types
from typing import Any

LONGEST_LINE = 1 << 20  # bytes of one call or reply
PASSED, FAILED, NO_CODE_PROCESS = 0, 20, 21  # exit statuses of `tests`; any other: it did not run to its end
READY = "ready"


class Channel:
    """JSON lines over two file descriptors."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")

    def send(self, message: object) -> None:
        """Write one message."""
        self._outgoing.write(json.dumps(message).encode() + b"\n")
        self._outgoing.flush()

    def receive(self) -> Any:
        """Read one message. EOFError when the other side has ended or writes too long a line."""
        line = self._incoming.readline(LONGEST_LINE + 1)
        if not line.endswith(b"\n"):
            raise EOFError(f"no complete message of at most {LONGEST_LINE} bytes")
        return json.loads(line)


def pack(value: Any) -> Any:
    """A value as JSON that keeps its type: lists stay lists, other collections become {type name: content}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a value of type {type(value).__name__} cannot be passed between the processes")


def unpack(packed: Any) -> Any:
    """The value that `pack` was given. It is made of built-in types only, whoever wrote `packed`."""
    if isinstance(packed, list):
        return [unpack(item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](unpack(item) for item in content)


def serve_code(job: dict[str, Any], channel: Channel) -> None:
    """Run the model's code, then call its function as often as asked."""
    channel.send(READY)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    exec(compile(job["code"], "answer", "exec"), module.__dict__)
    function = getattr(module, job["entry_point"])
    while True:
        args, kwargs = unpack(channel.receive())
        try:
            reply = {"value": pack(function(*args, **kwargs))}
        except Exception as error:
            reply = {"raised": type(error).__name__}
        channel.send(reply)


def run_tests(job: dict[str, Any], channel: Channel) -> None:
    """Run HumanEval's `check(candidate)`. Some tests use helper functions that the prompt defines."""

    def candidate(*args: Any, **kwargs: Any) -> Any:
        channel.send(pack((args, kwargs)))
        reply = channel.receive()
        if "raised" in reply:
            kind = getattr(builtins, reply["raised"], None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind()
            raise RuntimeError(reply["raised"])
        return unpack(reply["value"])

    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(as_definitions(job["prompt"]), namespace)
    exec(compile(job["test"], "tests", "exec"), namespace)
    namespace[job["entry_point"]] = candidate
    namespace["check"](candidate)


def as_definitions(prompt: str) -> types.CodeType:
    """The prompt as a program: it ends in a function whose body is a docstring, or is missing."""
    try:
        return compile(prompt, "prompt", "exec")
    except SyntaxError:
        return compile(f"{prompt.rstrip()}\n    pass\n", "prompt", "exec")


def main(role: str, job_descriptor: str) -> None:
    """Take the channel away from stdin and stdout, so that a stray `print` cannot disturb it, and play the role."""
    with os.fdopen(int(job_descriptor)) as file:
        job = json.load(file)
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if role == "code":
        return serve_code(job, channel)
    status = NO_CODE_PROCESS
    try:
        if channel.receive() == READY:
            status = FAILED
            run_tests(job, channel)
            status = PASSED
    except BaseException:  # whatever it is, the tests have not passed: SystemExit too
        pass
    os._exit(status)  # without atexit handlers, which could change the status


if __name__ == "__main__":
    main(*sys.argv[1:])
