"""`fledge doctor`: ten lines on this machine, an error only where every command would fail, and no waiting."""

import socket
import time

import pytest

from fledge.cli import run_command
from fledge.doctor import machine
from fledge.target import native


@pytest.fixture(autouse=True)
def no_network(monkeypatch, own_cache):
    monkeypatch.setattr(machine, "hub_host", lambda: None)


def test_ten_lines_on_a_machine_that_works(capsys):
    assert run_command("doctor", []) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and {line[:6].strip() for line in lines} <= {"ok", "note"}
    assert [line.split()[1] for line in lines] == [
        "python", "packages", "tested", "torch", "compiler", "memory", "gpu", "disk", "ports", "hub",
    ]  # fmt: skip


@pytest.mark.parametrize(("found", "text"), [("4.0", "transformers is 4.0, needed"), (None, "transformers is missing")])
def test_a_package_that_no_command_can_use_is_an_error(found, text, monkeypatch, capsys):
    real = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: found if name == "transformers" else real(name))
    assert run_command("doctor", []) == 1
    said = capsys.readouterr().err
    assert "BROKEN  packages" in said and text in said and "error: packages: mend" in said


def test_what_is_only_slower_or_not_possible_here_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(machine, "version_of", lambda name: "2.12.0" if name == "torch" else None)
    assert machine.compiler().state == machine.tested().state == "note"
    assert "torch 2.12.0 (tested " in machine.tested().text
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", range(port, port + 1))
        assert machine.ports().state == "note" and str(port) in machine.ports().text


def test_a_check_that_fails_itself_is_a_finding(monkeypatch):
    monkeypatch.setattr(machine, "cache_folder", lambda name: machine.Path("/proc/nothing/cache"))
    found = {one.what: one for one in machine.examine()}
    assert found["disk"].state == "broken" and found["hub"].state == "ok"


def test_a_hub_that_does_not_answer_is_waited_for_less_than_two_seconds(monkeypatch):
    """A firewall that drops packets, or a resolver that says nothing."""
    monkeypatch.setattr(machine, "hub_host", lambda: "hub.example")

    def silent(address: object, timeout: float) -> None:
        time.sleep(30)
        raise TimeoutError

    monkeypatch.setattr(machine.socket, "create_connection", silent)
    start = time.monotonic()
    assert machine.hub().state == "note" and time.monotonic() - start < 2


def test_a_hub_that_answers(monkeypatch):
    monkeypatch.setattr(machine, "hub_host", lambda: "127.0.0.1")
    monkeypatch.setattr(machine, "answers", lambda host, port, patience_s: True)
    assert machine.hub() == machine.Found("ok", "hub", "127.0.0.1 answers")


def test_with_a_path_it_is_inspect(tmp_path, capsys):
    assert run_command("doctor", [str(tmp_path / "nothing")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
