"""A model's code is judged, and can neither harm the machine nor forge the verdict.

Every attack is a function that returns True when it worked. It must not work in the sandbox; most of them are also run
without one, where they do work: that shows that the attack is real.
"""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fledge.bench import sandbox
from fledge.bench.sandbox import passes_tests, sandbox_problem
from fledge.bench.settings import BenchSettings, ModelSettings, ReportSettings, ServedSettings
from fledge.errors import UserError

PROBLEM = sandbox_problem()
needs_sandbox = pytest.mark.skipif(PROBLEM is not None, reason=f"no sandbox: {PROBLEM}")
ISOLATIONS = [pytest.param("bwrap", marks=needs_sandbox), "none"]
REPOSITORY = Path(__file__).parents[2]


def check(test: str, prompt: str = "def f(*args):\n    '''Any function.'''\n") -> dict[str, str]:
    return {"prompt": prompt, "entry_point": "f", "test": f"def check(candidate):\n    {test}\n"}


DOUBLE = check("assert candidate(2) == 4 and candidate(-1) == -2")


def succeeds(attack: str, isolation: str, time_limit_s: float = 10.0) -> bool:
    """Whether the body of a function returned True; exceptions count as no."""
    body = textwrap.indent(textwrap.dedent(attack), "        ")
    code = f"import os, sys, socket\ndef f():\n    try:\n{body}\n    except BaseException:\n        return False\n"
    return passes_tests(code, check("assert candidate() is True"), isolation=isolation, time_limit_s=time_limit_s)


# ---- right and wrong answers --------------------------------------------------------------------------------------

SOLUTIONS = [
    ("number", "    return x * 2\n", "    return x * 3\n", "assert candidate(2) == 4"),
    ("list", "    return sorted(x)\n", "    return x\n", "assert candidate([3, 1, 2]) == [1, 2, 3]"),
    ("tuple", "    return min(x), max(x)\n", "    return [min(x), max(x)]\n", "assert candidate([1, 5]) == (1, 5)"),
    ("text", "    return x[::-1]\n", "    return x\n", "assert candidate('caf\\u00e9\\ud800') == '\\ud800\\u00e9fac'"),
    ("float", "    return x / 3\n", "    return x // 3\n", "assert abs(candidate(1.0) - 1 / 3) < 1e-9"),
    ("nan", "    return [x, float('nan')]\n", "    return [x, 0.0]\n",
     "assert str(candidate(float('inf'))) == '[inf, nan]'"),
    ("none", "    return None\n", "    return 0\n", "assert candidate({'a': None}) is None"),
    ("bool", "    return x > 0\n", "    return int(x > 0)\n", "assert candidate(1) is True"),
    ("dict", "    return {(k, 1): v for k, v in x.items()}\n", "    return x\n",
     "assert candidate({1: b'b'}) == {(1, 1): b'b'}"),
    ("set", "    return {frozenset(x), 1j}\n", "    return set(x)\n",
     "assert candidate({2, 3}) == {frozenset({2, 3}), 1j}"),
    ("raises", "    raise KeyError(x)\n", "    raise TypeError(x)\n",
     "try:\n        candidate(1)\n        assert False\n    except KeyError:\n        pass"),
    ("helper", "    return -half(-x * 4)\n", "    return x\n", "assert half(candidate(3)) == 3.0"),
    ("prints", "    print('{\"value\": 0}'); return x\n", "    print(x); return None\n", "assert candidate(7) == 7"),
]  # fmt: skip
PROMPT = "def half(x):\n    return x / 2\n\n\ndef f(x):\n    '''What the test asks for.'''\n"


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(("right", "wrong", "test"), [row[1:] for row in SOLUTIONS], ids=[row[0] for row in SOLUTIONS])
def test_right_solutions_pass_and_wrong_ones_fail(right, wrong, test, isolation):
    """Values of every built-in type travel to the tests and back; helper functions of the prompt are there."""
    assert passes_tests(PROMPT + right, check(test, PROMPT), isolation=isolation) is True
    assert passes_tests(PROMPT + wrong, check(test, PROMPT), isolation=isolation) is False


@pytest.mark.parametrize("prompt", ["def f(x):\n", "def f(x):\n    # Twice x.\n"])
def test_a_prompt_without_docstring_is_no_program_yet(prompt):
    assert passes_tests(prompt + "    return 2 * x\n", DOUBLE | {"prompt": prompt}, isolation="none") is True


@pytest.mark.parametrize("code", ["def f(x:", "def g(x):\n    return 2 * x\n", "raise SystemExit(0)", ""])
def test_code_without_the_function_fails(code):
    assert passes_tests(code, DOUBLE, isolation="none") is False


# ---- the verdict --------------------------------------------------------------------------------------------------

FORGERIES = {
    "message and exit": "print('all tests passed', flush=True); import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit on call": "import os\ndef f(x): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = type('A', (), {})\nbuiltins.exec = print\n"
    "def f(x): return 5",
    "equal to everything": "class A:\n    __eq__ = lambda self, other: True\n    __hash__ = None\ndef f(x): return A()",
    "an int with other thoughts": "class A(int):\n    __eq__ = lambda self, other: True\n    __hash__ = None\n"
    "def f(x): return A(5)",
    "every channel": "import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'\"passed\"\\n' * 9)\n"
    "        except OSError: pass\n    os._exit(0)",
    "the other process": "import os, signal\ndef f(x):\n    for pid in range(2, 99):\n"
    "        try: os.kill(pid, signal.SIGUSR1)\n        except OSError: pass\n    os._exit(0)",
    "unknown reply": "import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'[]\\n')\n"
    "        except OSError: pass\n    return 5",
    "deep reply": "import os\ndef f(x):\n    for fd in range(64):\n"
    "        try: os.write(fd, b'[' * 300000 + b']' * 300000 + b'\\n')\n        except OSError: pass\n    return 5",
    "raises success": "def f(x): raise type('SystemExit', (Exception,), {})()",
}


@needs_sandbox
@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_the_verdict_cannot_be_forged(code):
    """`print("all tests passed"); os._exit(0)` once passed: the verdict was the end of the code's own output."""
    assert passes_tests(code, DOUBLE, time_limit_s=5.0) is False


SEARCH = """
import gc, re, sys
def f():
    seen, frame = repr(gc.get_objects()) + repr(sys.argv), sys._getframe()
    while frame:
        seen, frame = seen + repr(frame.f_globals) + repr(frame.f_locals), frame.f_back
    return re.findall("answer-[0-9]+", seen)[0]
"""


@needs_sandbox
def test_the_code_cannot_read_the_tests():
    """In one interpreter with its tests, code finds what they expect; the control has it in its own memory."""
    expected = check("assert candidate() == 'answer-4711'")
    assert passes_tests(SEARCH, expected) is False
    assert passes_tests(f"hint = 'answer-4711'\n{SEARCH}", expected) is True


def test_a_test_that_ends_its_process_is_an_error_of_the_data_set():
    with pytest.raises(UserError, match=r"unit tests of 'f' did not run to their end.*status 7"):
        passes_tests("def f(x): return 1", check("import os; os._exit(7)"), isolation="none")


# ---- what the code can reach --------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_TEST_SECRET", "abc")
    path = tmp_path / "secret.txt"
    path.write_text("abc")
    return path


def reaches(name: str, secret: Path, port: int) -> str:
    """The body of an attack that works where nothing isolates the code."""
    return {
        "reads a file": f"return open({str(secret)!r}).read() == 'abc'",
        "reads the working directory": f"return 'fledge' in open({str(REPOSITORY / 'pyproject.toml')!r}).read()",
        "writes a file": f"open({str(secret.parent / 'written')!r}, 'w').close(); return True",
        "environment of the parent": f"return b'PATH' in open('/proc/{os.getpid()}/environ', 'rb').read()",
        "signals the parent": f"os.kill({os.getpid()}, 0); return True",
        "network": f"socket.create_connection(('127.0.0.1', {port}), 2); return True",
        "many processes": """
            for _ in range(12):
                if not os.fork():
                    import time
                    time.sleep(1)
                    os._exit(0)
            return True""",
    }[name]


ATTACKS = ["reads a file", "reads the working directory", "writes a file", "environment of the parent",
           "signals the parent", "network", "many processes"]  # fmt: skip


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_outside_is_reached(name, isolation, secret):
    with socket.create_server(("127.0.0.1", 0)) as server:
        attack = reaches(name, secret, server.getsockname()[1])
        assert succeeds(attack, isolation) is (isolation == "none")
    assert (secret.parent / "written").exists() is (name == "writes a file" and isolation == "none")


@needs_sandbox
@pytest.mark.parametrize(
    "attack",
    [
        "return bool(set(os.environ) - {'PWD', 'LC_CTYPE'})",
        "return any(os.path.exists(p) for p in ('/proc/1', '/home', '/work', '/var', '/etc/passwd', '/sys'))",
        "open('/usr/written', 'w').close(); return True",
        "open('/written', 'w').close(); return True",
        "open('/dev/shm/written', 'w').close(); return True",
        "import ctypes; return ctypes.CDLL(None).unshare(0x10000000) == 0",  # its own user namespace: more to attack
        "return os.getuid() == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (99, 99)); return True",
        "import numpy; return True",
        "return bool(input())",
    ],
    ids=[
        "environment",
        "folders",
        "system",
        "root",
        "devices",
        "namespace",
        "uid",
        "limits",
        "packages",
        "stdin",
    ],
)
def test_the_sandbox_is_bare(attack):
    assert succeeds(attack, "bwrap") is False


@needs_sandbox
def test_the_sandbox_has_a_folder_of_its_own_and_the_standard_library():
    attack = "import tempfile, json; tempfile.TemporaryFile().write(b'x'); return os.listdir('/tmp') == []"
    assert succeeds(attack, "bwrap") is True


# ---- what the code can use up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    "attack",
    [
        "return bool(bytearray(1 << 30))",
        "open('big', 'wb').write(b'x' * (4 << 20)); return True",
        "return [open(os.devnull) for _ in range(100)] and True",
    ],
    ids=["memory", "large file", "open files"],
)
def test_limits_of_one_process(attack, isolation):
    assert succeeds(attack, isolation) is False


@needs_sandbox
def test_many_files_fill_a_small_folder_only():
    attack = """
        for number in range(40):
            open(f'/tmp/{number}', 'wb').write(b'x' * (1 << 20))
        return True"""
    assert succeeds(attack, "bwrap") is False
    assert succeeds(attack.replace("40", "8"), "bwrap") is True


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "def f(x):\n    while True: print('flood' * 1000)",
        "import os\ndef f(x):\n    while True:\n        for fd in range(3, 9):\n"
        "            try: os.write(fd, b'x' * 65536)\n            except OSError: pass",
        "import signal\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\ndef f(x):\n    while True: pass",
        "def f(x): return 'x' * (4 << 20)",
    ],
    ids=["endless", "endless call", "output", "flood of the channel", "ignores signals", "large answer"],
)
def test_time_and_output_are_limited(code, isolation):
    start = time.monotonic()
    assert passes_tests(code, DOUBLE, isolation=isolation, time_limit_s=2.0) is False
    assert time.monotonic() - start < 8.0


MARKED = "fledge-test-child-{}"


def marked_processes(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().split(b"\0")[0] == mark.encode():
                found.append(int(entry.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def child_that_stays(mark: str) -> str:
    return f"""
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.execv('/bin/sleep', [{mark!r}, '60'])
            os._exit(0)
        import time
        time.sleep(0.5)
        return True"""


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_child_survives(isolation):
    mark = MARKED.format(f"{os.getpid()}-{isolation}")
    assert succeeds(child_that_stays(mark), isolation) is True
    time.sleep(0.3)
    left = marked_processes(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert bool(left) is (isolation == "none")


@needs_sandbox
def test_the_code_ends_with_a_killed_benchmark():
    mark = MARKED.format(f"{os.getpid()}-killed")
    code = f"import os\ndef f(x): os.execv('/bin/sleep', [{mark!r}, '60'])"
    program = f"from fledge.bench.sandbox import passes_tests; passes_tests({code!r}, {DOUBLE!r}, time_limit_s=60.0)"
    benchmark = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    while not marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_processes(mark)
    benchmark.kill()
    benchmark.wait()
    time.sleep(0.5)
    assert not marked_processes(mark)


# ---- without a sandbox --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_probe():
    sandbox_problem.cache_clear()
    yield
    sandbox_problem.cache_clear()


def flags(**output) -> BenchSettings:
    return BenchSettings(model=ModelSettings(target="target", draft="head"), output=ReportSettings(**output))


def test_run_code_is_refused_where_bubblewrap_is_missing(fresh_probe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="bwrap was not found.*apt-get install bubblewrap.*--run-code-unsandboxed"):
        flags(run_code=True).check()
    flags(run_code_unsandboxed=True).check()
    flags().check()


def test_run_code_is_refused_where_bubblewrap_fails(fresh_probe, monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'no permissions to create a new namespace' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="bwrap fails here .no permissions to create a new namespace."):
        flags(run_code=True).check()


def test_the_two_ways_exclude_each_other_and_a_server_has_neither():
    with pytest.raises(UserError, match="exclude each other"):
        flags(run_code=True, run_code_unsandboxed=True).check()
    args = BenchSettings(
        model=ModelSettings(target="t", draft="h"), output=ReportSettings(run_code_unsandboxed=True),
        server=ServedSettings(backend="server"),
    )  # fmt: skip
    with pytest.raises(UserError, match="Drop --run-code-unsandboxed"):
        args.check()


def test_a_user_without_privileges_needs_no_outer_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox, "_is_root", lambda: False)
    assert sandbox._sandbox().count("bwrap") == 1
