"""Without the hub, a wrong name is told in seconds; it took the library half a minute of retries, and more per file."""

import os
import socket

import datasets.config
import pytest
from huggingface_hub import constants

from fledge import offline
from fledge.cli import run_command


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in [*offline.PROXIES, *map(str.upper, offline.PROXIES), "HF_ENDPOINT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "kept")  # so that monkeypatch puts back what was there
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    offline.stop_asking_an_unknown_hub.cache_clear()
    yield
    offline.stop_asking_an_unknown_hub.cache_clear()


@pytest.fixture
def unknown(monkeypatch):
    asked = []

    def refuse(host, port):
        asked.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(offline.socket, "getaddrinfo", refuse)
    return asked


def test_a_hub_that_nobody_knows_is_not_asked(unknown, capsys):
    offline.stop_asking_an_unknown_hub()
    offline.stop_asking_an_unknown_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and unknown == ["huggingface.co"]
    assert capsys.readouterr().err.count("not reachable from here") == 1


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_a_proxy_may_know_it(unknown, name, monkeypatch):
    monkeypatch.setenv(name, "http://proxy:3128")
    offline.stop_asking_an_unknown_hub()
    assert "HF_HUB_OFFLINE" not in os.environ and unknown == []


def test_a_hub_that_is_there_is_asked(monkeypatch):
    monkeypatch.setattr(offline.socket, "getaddrinfo", lambda host, port: [])
    offline.stop_asking_an_unknown_hub()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_the_mirror_is_looked_for_where_one_is_named(unknown, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    offline.stop_asking_an_unknown_hub()
    assert unknown == ["mirror.example"]


def test_a_command_with_a_wrong_name(unknown, capsys):
    assert run_command("decode", ["--target", "nobody/nothing", "--prompt", "hello"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "nobody/nothing: could not be loaded" in said and "Retrying" not in said


def test_a_wrong_path_is_told_without_the_hub(unknown, capsys):
    assert run_command("decode", ["--target", "/nowhere/model", "--prompt", "hello"]) == 1
    said = capsys.readouterr().err
    assert "/nowhere/model: no such folder" in said and "not reachable" not in said and not unknown


@pytest.mark.parametrize("words", [
    ["inspect", "nobody/data", "--target", "TARGET"], ["train", "--target", "TARGET", "--data", "nobody/data"],
    ["regenerate", "--data", "nobody/data", "--target", "TARGET", "--engine", "transformers"],
])  # fmt: skip
def test_a_data_set_of_the_hub(words, unknown, tiny_model_dir, tmp_path, capfd):
    """Half a minute of retries for each."""
    words = [str(tiny_model_dir) if word == "TARGET" else word for word in words]
    output = [] if words[0] == "inspect" else ["--output-dir", str(tmp_path / "out")]
    assert run_command(words[0], [*words[1:], *output]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "nobody/data: neither a file or folder here nor a data set" in said and "Retrying" not in said


@pytest.mark.parametrize(("name", "said"), [
    ("nobody/nothing", "nobody/nothing: no folder here, and its config.json cannot be had from the hub"),
    ("/no/such/folder", "/no/such/folder: no such folder"),
])  # fmt: skip
def test_servers_of_a_wrong_model_are_not_started(name, said, unknown, capsys):
    """vLLM's traceback of sixty lines was shown joined into one."""
    assert run_command("serve", ["--target", name, "--vllm", "/bin/true"]) == 1
    assert said in capsys.readouterr().err
    assert run_command("serve", ["--target", name, "--vllm", "/bin/true", "--print"]) == 0  # for another machine


def test_a_folder_needs_no_hub(unknown, tmp_path):
    assert run_command("decode", ["--target", str(tmp_path), "--prompt", "hello"]) == 1
    assert unknown == []
