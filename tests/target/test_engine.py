"""`fledge serve` with a program in vLLM's place: plan, start, death, stop."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from fledge.commands.parser import parse
from fledge.commands.serve import ServeArgs, parse_args, serve
from fledge.errors import UserError
from fledge.servers import processes as engine
from fledge.servers.processes import ServerSettings, plan, running, visible_gpus

REPOSITORY = Path(__file__).resolve().parents[2]

FAKE_VLLM = """#!{python}
import http.server, subprocess, sys, time
words = sys.argv[1:]
host, port = words[words.index("--host") + 1], int(words[words.index("--port") + 1])
print("fake vllm", words, flush=True)
if "--fail" in words:
    sys.exit("out of memory, says the fake")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's engine process
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *line): pass
server = http.server.HTTPServer((host, port), Handler)
start = time.time()
while "--die-after" not in words or time.time() - start < float(words[words.index("--die-after") + 1]):
    server.timeout = 0.1
    server.handle_request()
sys.exit(3)
"""


@pytest.fixture
def fake_vllm(tmp_path) -> str:
    program = tmp_path / "vllm"
    program.write_text(FAKE_VLLM.format(python=sys.executable))
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def port() -> int:
    """The first of three neighbouring free ports."""
    for _ in range(50):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        if first < 65000 and all(free(first + i) for i in range(3)):
            return first
    raise AssertionError("no free ports")


def free(number: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) != 0


def args(**more) -> ServerSettings:
    return ServerSettings(target="target", **more)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child")]


def test_one_server_per_gpu_group():
    servers = plan(args(tensor_parallel_size=2, base_port=7000), ["0", "1", "2", "3", "4"])
    assert [(server.port, server.gpus) for server in servers] == [(7000, "0,1"), (7001, "2,3")]
    command = shlex.join(servers[0].command)
    assert command == "vllm serve target --host 127.0.0.1 --port 7000 --tensor-parallel-size 2"
    assert servers[0].shell_line().startswith("CUDA_VISIBLE_DEVICES=0,1 vllm serve")
    assert [server.gpus for server in plan(args(num_servers=2), [])] == ["", ""]  # a machine without GPUs
    assert [server.gpus for server in plan(args(num_servers=1), ["GPU-ab", "GPU-cd"])] == ["GPU-ab"]


@pytest.fixture
def cpu_only(monkeypatch):
    """A machine of eight cores and 24 GiB, on which the user has set nothing."""
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=24 << 30))
    monkeypatch.setattr(engine, "physical_cores", lambda: list(range(8)))


def variable(name: str, **more) -> list[str | None]:
    return [server.environment.get(name) for server in plan(args(**more), [])]


def test_servers_without_gpus_share_a_part_of_the_memory(cpu_only, monkeypatch):
    """vLLM's CPU build would fill it: the cache of each is stated, unless the user stated it."""
    assert variable("VLLM_CPU_KVCACHE_SPACE", num_servers=2) == ["3", "3"]
    assert variable("VLLM_CPU_KVCACHE_SPACE", num_servers=50)[0] == "1"
    assert plan(args(num_servers=1), ["0"])[0].environment == {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert variable("VLLM_CPU_KVCACHE_SPACE", num_servers=1) == [None]


def test_servers_without_gpus_share_the_cores(cpu_only, monkeypatch):
    """vLLM would give all of them the same ones, and of few cores keep one idle."""
    bind = "VLLM_CPU_OMP_THREADS_BIND"
    assert variable(bind, num_servers=2) == ["0,1,2,3", "4,5,6,7"]
    assert variable(bind, num_servers=2, tensor_parallel_size=2) == ["0,1|2,3", "4,5|6,7"]
    assert variable(bind, num_servers=1) == [None] and variable(bind, num_servers=9) == [None] * 9
    monkeypatch.setattr(engine, "physical_cores", lambda: [0, 1])
    assert variable(bind, num_servers=1) == ["0,1"]
    monkeypatch.setattr(engine, "physical_cores", lambda: list(range(12)))
    assert variable(bind, num_servers=2) == ["0,1,2,3,4", "6,7,8,9,10"]  # enough to keep one for the scheduler
    monkeypatch.setenv(bind, "3")
    assert variable(bind, num_servers=2) == [None, None]


def test_physical_cores_are_some_of_ours():
    cores = engine.physical_cores()
    assert cores == sorted(set(cores)) and set(cores) <= os.sched_getaffinity(0) and cores


def test_intel_openmp_is_loaded_where_vllm_brought_it(cpu_only, monkeypatch, tmp_path):
    program, library = tmp_path / "bin" / "vllm", tmp_path / "lib" / "libiomp5.so"
    for file in (program, library):
        file.parent.mkdir()
        file.touch(mode=0o755)
    assert variable("LD_PRELOAD", vllm=str(program)) == [str(library)]
    monkeypatch.setenv("LD_PRELOAD", "libmine.so")
    assert variable("LD_PRELOAD", vllm=str(program)) == [None]
    monkeypatch.delenv("LD_PRELOAD")
    library.unlink()
    assert variable("LD_PRELOAD", vllm=str(program)) == [None]


def test_more_servers_than_gpus_are_refused():
    with pytest.raises(UserError, match="3 servers of 2 GPUs need 6 GPUs, 4 are visible"):
        plan(args(tensor_parallel_size=2, num_servers=3), ["0", "1", "2", "3"])


def test_gpus_come_from_the_flag_or_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert visible_gpus(None) == ["4", "5"] and visible_gpus("1, 3") == ["1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(None) == []


def test_a_head_and_further_arguments_reach_vllm():
    words = ["--model-name-or-path", "target", "--draft", "a head", "--num-speculative-tokens", "4", "--max-model-len",
             "2048", "--", "--gpu-memory-utilization", "0.8", "--enforce-eager"]  # fmt: skip
    parsed = parse_args(ServeArgs, words, prog="fledge serve", description="")
    command = plan(parsed, [])[0].command
    given = json.loads(command[command.index("--speculative-config") + 1])
    assert given == {"method": "eagle3", "model": "a head", "num_speculative_tokens": 4}
    assert command[-3:] == ("--gpu-memory-utilization", "0.8", "--enforce-eager")
    assert "--max-model-len" in command and "--speculative-config" not in plan(args(), [])[0].command
    with pytest.raises(
        UserError, match="unknown flag '--enforce-eager'"
    ):  # without the --, an unknown flag is an error
        parse(ServeArgs, ["--model-name-or-path", "target", "--enforce-eager"], prog="x", description="")


@pytest.mark.parametrize("text", [",", "x", "-1", "0,0", "0,"])
def test_a_list_of_gpus_that_is_none_is_refused(text):
    """`--gpus ,` once meant a machine without GPUs."""
    with pytest.raises(UserError, match="no list of different GPUs"):
        visible_gpus(text)
    assert visible_gpus("") == [] and visible_gpus("GPU-8f1e-0a, 1") == ["GPU-8f1e-0a", "1"]


def test_print_starts_nothing(capsys):
    serve(ServeArgs(target="target", print=True, vllm="/no/such/vllm", base_port=1, num_servers=2, gpus=""))
    lines = capsys.readouterr().out.splitlines()
    assert (
        all(" /no/such/vllm serve " in f" {line}" for line in lines) and len(lines) == 2 and "--port 2 >>" in lines[1]
    )


def test_servers_answer_inside_the_block_and_are_gone_after_it(fake_vllm, port, tmp_path):
    servers = plan(args(vllm=fake_vllm, num_servers=2, base_port=port, output_dir=tmp_path / "logs" / "new"), [])
    with running(servers, 20) as processes:
        for server in servers:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as response:
                assert response.status == 200
        started = [pid for server in servers for pid in children(server.log)]
        assert len(started) == 2 and all(map(lives, started))
    assert all(process.poll() is not None for process in processes)
    assert not any(map(lives, started))  # what the servers started is gone too


def test_when_one_dies_all_are_stopped_and_its_log_is_shown(fake_vllm, port, tmp_path):
    one = plan(args(vllm=fake_vllm, base_port=port, output_dir=tmp_path), [])[0]
    other = plan(args(vllm=fake_vllm, base_port=port + 1, output_dir=tmp_path, vllm_args=("--die-after", "1")), [])[0]
    with pytest.raises(UserError, match=rf"port {port + 1} ended with status 3.*fake vllm"), \
            running([one, other], 20) as processes:  # fmt: skip
        while True:
            engine.check_alive([one, other], processes)
            time.sleep(0.05)
    assert processes[0].poll() is not None


def test_a_server_that_does_not_start_says_why(fake_vllm, port, tmp_path):
    servers = plan(args(vllm=fake_vllm, base_port=port, output_dir=tmp_path, vllm_args=("--fail",)), [])
    servers[0].log.write_text("of an earlier run\n")
    with pytest.raises(UserError, match="out of memory, says the fake") as caught, running(servers, 20):
        raise AssertionError("it never answers")
    assert "earlier run" in servers[0].log.read_text() and "earlier run" not in str(caught.value)


def test_a_missing_program_and_a_taken_port_are_named(fake_vllm, port, tmp_path):
    with pytest.raises(UserError, match="no such program.*--vllm"), running(plan(args(vllm="/no/vllm"), []), 5):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        servers = plan(args(vllm=fake_vllm, base_port=port, output_dir=tmp_path), [])
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be used"), running(servers, 5):
            pass


@pytest.mark.parametrize("sign, status", [(signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_the_script_stops_its_servers_on_a_signal(fake_vllm, port, tmp_path, sign, status):
    """The documented entry point, from the shell: ready table, then Ctrl-C (or a scheduler's SIGTERM)."""
    environment = {
        **os.environ, "MODEL_NAME": "target", "BASE_PORT": str(port), "LOG_DIR": str(tmp_path / "logs"),
        "VLLM": fake_vllm, "NUM_SERVERS": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    (tmp_path / "target").mkdir()
    script = REPOSITORY / "scripts" / "speculative" / "run_vllm_server.sh"
    process = subprocess.Popen(
        ["bash", str(script), "--some-vllm-flag"], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background inherits "ignore"
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while "Ctrl-C stops all" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.5)
    logs = sorted((tmp_path / "logs").glob("*.log"))
    started = [pid for log in logs for pid in children(log)]
    assert len(started) == 2 and all("--some-vllm-flag" in log.read_text() for log in logs)
    process.send_signal(sign)
    rest = process.stderr.read()
    assert process.wait(30) == status and "all servers are stopped" in rest
    assert f"127.0.0.1:{port + 1}/v1" in seen + rest
    assert not any(map(lives, started))
