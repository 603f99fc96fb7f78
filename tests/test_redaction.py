"""No secret reaches a file or the terminal: by value where it is known, by its place where it is not."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.hostile_server import MODELS, completion, http, serving

from fledge import cli, console, provenance
from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.data.rejects import Rejects
from fledge.errors import UserError
from fledge.redaction import keep_secret, redact, redacted
from fledge.regeneration.journal import Journal
from fledge.regeneration.settings import EngineSettings, PromptSourceSettings
from fledge.train.resume import check_same_run


@pytest.mark.parametrize(
    "text",
    [
        "http://ann:{}@host:8000/v1: HTTP 500",
        "https://{}@host/x",
        "GET https://host/a?x=1&api_key={}&y=2",
        "https://host/a?token={}",
        "Authorization: Bearer {}",
        "Incorrect API key provided: api_key={}",
        '{{"api_key": "{}"}}',
        "fledge train --hub_token {} --seed 3",
        "fledge train --push_to_hub_token={}",
        "fledge serve TARGET -- --api-key '{}'",
        "password: {}",
    ],
)
def test_secrets_are_known_by_their_place(text):
    secret = "Zx9-unheard-of"
    shown = redact(text.format(secret))
    assert secret not in shown and "***" in shown
    assert len(shown) > 3  # the rest is there


@pytest.mark.parametrize(
    "key",
    ["sk-abcdefghijklmnop1234", "hf_abcdefghijklmnopqrst", "ghp_abcdefghijklmnopqrstuvwxyz", "AKIAABCDEFGHIJKLMNOP"],
)
def test_secrets_are_known_by_their_form(key):
    assert redact(f"you sent {key}, which is wrong") == "you sent ***, which is wrong"


@pytest.mark.parametrize(
    "text",
    [
        "fledge bench --total-token 60 --max-new-token 1024 --sample-top-k 5",
        "fledge regenerate --api-key-env OPENAI_API_KEY --max-tokens 20",
        "fledge train --lm_head_key model.embed_tokens.weight --batch-tokens 4096",
        "http://127.0.0.1:8000/v1: HTTP 500: out of memory; see someone@example.com",
        '{"eos_token": "</s>", "bos_token_id": 1, "num_tokens": 7}',
        "shard-00000.jsonl: 3 tokens, key 'loss_mask' is missing",
        "skipped: risk-averse-planning-of-something",
    ],
)
def test_the_rest_stays(text):
    """Control: nothing is taken out of what holds no secret."""
    assert redact(text) == text
    assert redacted({"eos_token": "</s>", "api_key_env": "MY_KEY", "a": [text, 1, None, 2.5, True]}) == {
        "eos_token": "</s>", "api_key_env": "MY_KEY", "a": [text, 1, None, 2.5, True],
    }  # fmt: skip


def test_secrets_are_known_by_value(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "a plain sentence")
    keep_secret("told/once")
    keep_secret("abc")  # too short to be told from a word
    assert redact("echo: a plain sentence, told/once, told%2Fonce, abc") == "echo: ***, ***, ***, abc"
    monkeypatch.delenv("SOME_API_KEY")
    assert redact("a plain sentence") == "a plain sentence"  # control


def test_fields_named_like_secrets():
    document = {"hub_token": "x", "nested": [{"password": "y", "push_to_hub_token": None}], "client_secret": ""}
    expected = {"hub_token": "***", "nested": [{"password": "***", "push_to_hub_token": None}], "client_secret": ""}
    assert redacted(document) == expected


def test_every_writer_leaves_them_out(tmp_path, monkeypatch, capsys):
    secret = "hunter2-hunter2"
    url = f"http://ann:{secret}@host:1/v1"
    monkeypatch.setattr("sys.argv", ["/bin/fledge", "train", "--hub_token", secret, "--server", url])
    provenance.write(tmp_path / "provenance.json", {"hub_token": secret, "endpoints": (url,)}, more={"url": url})
    rejects = Rejects(tmp_path / "rejects.jsonl", max_share=0.0)
    rejects.seen = 1
    rejects.add("1", "HTTP 401", f"{url}: wrong key", "here:1")
    with pytest.raises(UserError) as stopped:
        rejects.check()
    rejects.close()
    with Journal(tmp_path / "run", total=1, shard_size=1, settings={"endpoint": url}, tally=lambda row: {}) as journal:
        journal.reject(0, "0", "HTTP 500", f"{url} failed", "here:1")
    with Journal(tmp_path / "run", total=1, shard_size=1, settings={"endpoint": url}, tally=lambda row: {}):
        pass  # the same settings are still the same
    resolved = {"output_dir": tmp_path, "hub_token": secret, "seed": 1}
    check_same_run(tmp_path, resolved, resuming=False)
    check_same_run(tmp_path, resolved, resuming=True)
    console.say(url)
    console.warn(url)
    console.show_error(str(stopped.value))
    console.show_table("servers", ("URL",), [(url,)])
    said = capsys.readouterr()
    assert secret not in said.out + said.err and said.err.count("ann") == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert secret not in path.read_text(errors="replace"), path


def test_what_is_not_utf8_is_written_as_its_code(tmp_path, monkeypatch):
    """A path of other bytes reaches Python as half surrogate pairs, which no file in UTF-8 can hold."""
    monkeypatch.setattr("sys.argv", ["/bin/fledge", "train", "--output_dir", "o\udcff"])
    provenance.write(tmp_path / "provenance.json", {"output_dir": "o\udcff"})
    written = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert written["config"]["output_dir"] == r"o\udcff" and r"o\udcff" in written["command"]
    rejects = Rejects(tmp_path / "rejects.jsonl")
    rejects.add("1", "broken", "nothing", "o\udcff.jsonl:1")
    rejects.close()
    assert r"o\udcff.jsonl:1" in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8")


def test_an_error_of_a_command_is_shown_without_them(capsys, tmp_path):
    url = "http://ann:hunter2-hunter2@127.0.0.1:9"
    status = cli.run_command("regenerate", ["--data-name-or-path", str(one_row(tmp_path)), "--output-dir",
                                            str(tmp_path / "out"), "--endpoints", url])  # fmt: skip
    said = capsys.readouterr().err
    assert status == 1 and "no server answers" in said and "hunter2" not in said


def one_row(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text(json.dumps({"id": "1", "conversations": [{"from": "human", "value": "q"}]}) + "\n")
    return path


def test_a_server_behind_a_password_is_reached_and_what_it_echoes_is_not_kept(tmp_path, capsys):
    """A proxy asks for user and password; the server repeats the password in its error."""
    failing = [True]

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        error = json.dumps({"error": {"message": "bad key hunter2-hunter2, try again"}}).encode()
        models = path.endswith("/models")
        good = MODELS if models else json.dumps(completion()).encode()
        writer.write(http(error, status="422 No") if failing[0] and not models else http(good))

    with serving(handler) as url:
        named = url.replace("http://", "http://ann:hunter2-hunter2@")
        args = RegenerateArgs(
            prompts=PromptSourceSettings(data=str(one_row(tmp_path)), max_reject_share=1.0),
            output_dir=tmp_path / "out", engines=EngineSettings(server=(named,), max_attempts=1),
        )  # fmt: skip
        with pytest.raises(UserError, match="no row was answered"):
            regenerate(args)
        text = (tmp_path / "out" / "rejects.jsonl").read_text()
        assert "bad key ***, try again" in text
        failing[0] = False
        regenerate(replace(args, engines=replace(args.engines, retry_rejects=True)))  # connecting works
    assert json.loads((tmp_path / "out" / "shard-00000.jsonl").read_text())["id"] == "1"
    said = capsys.readouterr()
    for place in [
        said.out,
        said.err,
        *(p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file()),
    ]:
        assert "hunter2" not in place
