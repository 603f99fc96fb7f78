"""`fledge regenerate` from conversations to shards: turns, draws, choices, rejects, and the rows that train."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.openai_server import FakeServer, ServerThread, answer_to
from PIL import Image
from regenerating import prompts, regenerate_only, rejects_of, rows_of, run, write

from fledge.cli import run_command
from fledge.commands.regenerate import RegenerateArgs, _engine, _settings
from fledge.data.conversations import Conversation, read_conversations
from fledge.data.rejects import Rejects
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.regeneration.engine import PromptAnswer
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings
from fledge.regeneration.turns import token_fields


@pytest.fixture
def server():
    thread = ServerThread(FakeServer())
    yield thread
    thread.stop()


def test_rows_hold_the_targets_answers_in_training_format(server, tmp_path):
    data = write(tmp_path / "in.jsonl", [
        {"id": "a", "source": "here", "n": 3, "finish_reason": "stop", "conversations": [
            {"from": "human", "value": "one"}, {"from": "gpt", "value": "OLD"}]},
    ])  # fmt: skip
    (row,) = run(data, tmp_path / "out", server.url)
    assert row["conversations"] == [{"from": "human", "value": "one"}, {"from": "gpt", "value": answer_to("one")}]
    assert row["source"] == "here" and "n" not in row and row["finish_reason"] == "stop"
    assert row["sampling"] == {"temperature": 0.7, "top_p": 1.0, "seed": row["sampling"]["seed"], "max_tokens": 64}
    assert row["num_output_tokens"] == len(row["token_ids"]) and row["model"] == "fake-target"


def test_every_turn_is_asked_with_the_targets_own_previous_answers(server, tmp_path):
    turns = [("user", "one"), ("assistant", "OLD 1"), ("user", "two"), ("assistant", "OLD 2"), ("user", "three")]
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": [{"role": r, "content": c} for r, c in turns]}])
    (row,) = run(data, tmp_path / "out", server.url, prompt={"data_format": "messages", "system": "be brief"})
    said = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": answer_to("one")}, {"role": "user", "content": "two"},
        {"role": "assistant", "content": answer_to("two")}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": answer_to("three")},
    ]  # fmt: skip
    assert row["messages"] == said
    assert [body["messages"] for body in server.server.bodies] == [said[:2], said[:4], said[:6]]
    assert "OLD" not in json.dumps([server.server.bodies, row])


def test_a_cut_answer_ends_its_conversation(server, tmp_path):
    turns = [("human", "q [fault: length]"), ("gpt", "x"), ("human", "never asked"), ("gpt", "x")]
    data = write(tmp_path / "in.jsonl", [{"id": "a", "conversations": [{"from": r, "value": v} for r, v in turns]}])
    (row,) = run(data, tmp_path / "out", server.url)
    assert len(row["conversations"]) == 2 and row["finish_reason"] == "length" and row["turns_left_out"] == 1
    assert row["turns_left_out_because"] == "answer cut" and "never asked" not in server.server.asked
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["turns left out: answer cut"] == 1


@pytest.mark.parametrize("fault, kept", [("too-long", True), ("500", False)])
def test_a_later_turn_beyond_the_context_shortens_the_row_but_a_failing_server_rejects_it(
    server, tmp_path, fault, kept
):
    turns = [("human", "fine"), ("gpt", "x"), ("human", f"q [fault: {fault}]"), ("gpt", "x"), ("human", "third")]
    data = write(tmp_path / "in.jsonl", [
        {"id": "a", "conversations": [{"from": r, "value": v} for r, v in turns]},
        {"id": "b", "conversations": [{"from": "human", "value": "plain"}]},
    ])  # fmt: skip
    rows = run(data, tmp_path / "out", server.url, prompt={"max_reject_share": 1.0})
    if kept:
        assert [row["id"] for row in rows] == ["a", "b"] and len(rows[0]["conversations"]) == 2
        assert (rows[0]["turns_left_out"], rows[0]["turns_left_out_because"]) == (2, "context length")
    else:
        assert [row["id"] for row in rows] == ["b"] and rejects_of(tmp_path / "out") == [("a", "HTTP 500")]


def test_cut_answers_are_kept_or_dropped_by_choice_and_counted(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "fine", "q [fault: length]")
    assert [row["finish_reason"] for row in run(data, tmp_path / "keep", server.url)] == ["stop", "length"]
    assert [row["id"] for row in run(data, tmp_path / "drop", server.url, answer={"truncated": "drop"})] == ["r0"]
    assert rejects_of(tmp_path / "drop") == [("r1", "answer cut")]
    counts = json.loads((tmp_path / "keep" / "manifest.json").read_text())["counts"]
    assert (counts["finish_reason: stop"], counts["finish_reason: length"]) == (1, 1)
    dropped = json.loads((tmp_path / "drop" / "manifest.json").read_text())["counts"]
    assert dropped["rejected: answer cut"] == 1


def test_everything_that_can_be_answered_is(server, tmp_path):
    """Every fault at once: passing ones leave no trace, lasting ones are listed with their reason."""
    passing = [f"{i} [fault: {fault} x1]" for i, fault in enumerate(("429", "500", "reset", "bad-json", "empty"))]
    lasting = [f"{i} [fault: {fault}]" for i, fault in enumerate(("500", "too-long", "bad-json", "empty", "reset"))]
    data = prompts(tmp_path / "in.jsonl", *passing, *lasting, *(f"plain {i}" for i in range(10)))
    rows = run(data, tmp_path / "out", server.url, prompt={"max_reject_share": 0.5})
    assert [row["id"] for row in rows] == [f"r{i}" for i in (*range(5), *range(10, 20))]
    assert rejects_of(tmp_path / "out") == [
        ("r5", "HTTP 500"), ("r6", "context length"), ("r7", "malformed answer"), ("r8", "empty answer"),
        ("r9", "connection broke"),
    ]  # fmt: skip


def test_too_many_rejects_fail_the_run_after_writing_everything(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "fine", "q [fault: 500]")
    with pytest.raises(UserError, match="1 of 2 rows have no answer, more than the 5%"):
        run(data, tmp_path / "out", server.url)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["r0"]


def test_rejected_rows_can_be_asked_again(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "fine", "q [fault: 500 x3]")
    allowed = {"max_reject_share": 1.0}
    assert len(run(data, tmp_path / "out", server.url, prompt=allowed)) == 1  # two attempts are not enough
    assert len(run(data, tmp_path / "out", server.url, prompt=allowed)) == 1  # asked only on request
    rows = run(data, tmp_path / "out", server.url, prompt=allowed, engine={"retry_rejects": True})
    assert [row["id"] for row in rows] == ["r0", "r1"] and rejects_of(tmp_path / "out") == []


def test_draws_follow_from_seed_and_id_alone(server, tmp_path):
    questions = [f"question {i}" for i in range(200)]
    mixture = {"temperature": "0.0:0.3,0.7:0.7", "thinking": "both"}
    rows = run(prompts(tmp_path / "a.jsonl", *questions), tmp_path / "a", server.url, shard_size=200, answer=mixture)
    again = run(
        prompts(tmp_path / "b.jsonl", *questions[:50]), tmp_path / "b", server.url, shard_size=200, answer=mixture
    )
    other = run(prompts(tmp_path / "c.jsonl", *questions[:50]), tmp_path / "c", server.url,
                shard_size=200, answer={**mixture, "seed": 1})  # fmt: skip
    drawn = [(row["sampling"], row["thinking"]) for row in rows]
    assert drawn[:50] == [(row["sampling"], row["thinking"]) for row in again]
    assert drawn[:50] != [(row["sampling"], row["thinking"]) for row in other]
    assert len({sampling["seed"] for sampling, _ in drawn}) == 200
    temperatures = Counter(sampling["temperature"] for sampling, _ in drawn)
    assert set(temperatures) == {0.0, 0.7} and 35 <= temperatures[0.0] <= 85
    assert 70 <= sum(thinking for _, thinking in drawn) <= 130
    sent = {b["messages"][0]["content"]: b["chat_template_kwargs"] for b in server.server.bodies[:200]}
    assert all(sent[q] == row["chat_template_kwargs"] for q, row in zip(questions, rows, strict=True))


def test_equal_prompts_are_asked_once_when_told_to(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "same", "other", "same", "same")
    assert [row["id"] for row in run(data, tmp_path / "out", server.url, prompt={"deduplicate": True})] == ["r0", "r1"]
    assert rejects_of(tmp_path / "out") == [("r2", "duplicate prompt"), ("r3", "duplicate prompt")]
    assert server.server.asked["same"] == 1
    assert len(run(data, tmp_path / "all", server.url)) == 4


def test_long_prompts_are_rejected_before_they_are_asked(server, tmp_path, target_dir):
    data = prompts(tmp_path / "in.jsonl", "short", "long " * 100)
    rows = run(data, tmp_path / "out", server.url,
               prompt={"max_prompt_length": 200, "target": str(target_dir)})  # fmt: skip
    assert [row["id"] for row in rows] == ["r0"] and rejects_of(tmp_path / "out") == [("r1", "prompt too long")]
    assert set(server.server.asked) == {"short"}


def test_unreadable_rows_are_listed_beside_the_others(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", *(f"q{i}" for i in range(30)))
    data.write_text(data.read_text() + "{broken\n")
    assert len(run(data, tmp_path / "out", server.url)) == 30
    assert rejects_of(tmp_path / "out") == [("in-30", "broken row")]


def test_a_finished_run_asks_nothing_and_other_input_is_refused(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "one", "two")
    run(data, tmp_path / "out", server.url)
    run(data, tmp_path / "out", server.url)
    assert server.server.asked == {"one": 1, "two": 1}
    prompts(data, "one", "changed")
    with pytest.raises(UserError, match="input_sha256 was .*, now"):
        run(data, tmp_path / "out", server.url)


def test_images_reach_the_server_as_data_urls_and_broken_ones_reject_their_row(server, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    (tmp_path / "bad.png").write_bytes(buffer.getvalue()[:40])
    text = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image", "image": "red.png"},
        {"type": "image_url", "image_url": {"url": str(tmp_path / "red.png")}},
        {"type": "image", "image": text},
        {"type": "image_url", "image_url": f"data:image/png;base64,{text}"},
        {"type": "image", "image": "bad.png"},
        {"type": "image", "image": "missing.png"},
    ]
    data = write(tmp_path / "in.jsonl", [
        {"id": str(i), "messages": [{"role": "user", "content": [part, {"type": "text", "text": f"what is {i}?"}]}]}
        for i, part in enumerate(parts)
    ])  # fmt: skip
    rows = run(data, tmp_path / "out", server.url, prompt={"max_reject_share": 0.5})
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    assert rejects_of(tmp_path / "out") == [("4", "broken image"), ("5", "broken image")]
    sent = {part["image_url"]["url"] for body in server.server.bodies for part in body["messages"][0]["content"][:1]}
    assert sent == {f"data:image/png;base64,{text}"}
    assert rows[0]["messages"][0]["content"][0]["image"] == str(tmp_path / "red.png")  # means the same from anywhere
    assert "token_ids" not in rows[0]


def test_the_rows_train(server, tmp_path, target_dir):
    """What regenerate writes, tokenize supervises: exactly the tokens the server said it wrote."""
    data = prompts(tmp_path / "in.jsonl", "one", "two")
    rows = run(data, tmp_path / "out", server.url)
    template = ChatTemplate.from_pretrained(str(target_dir))
    read = list(read_conversations(str(tmp_path / "out"), rejects=Rejects()))
    assert len(read) == 2
    for row, conversation in zip(rows, read, strict=True):
        ids = {"prompt_token_ids": None, "token_ids": None}
        by_text = template.encode(Conversation(conversation.id, conversation.messages, {**conversation.meta, **ids}))
        words = template.tokenizer.decode(by_text.input_ids[by_text.loss_mask])
        assert words == row["conversations"][-1]["value"] + "<|im_end|>"
        assert bytes(row["token_ids"][:-1]).decode() == row["conversations"][-1]["value"]  # a token is a byte there


def test_token_fields_of_several_turns():
    def answer(prompt: list[int], output: list[int] | None) -> PromptAnswer:
        return PromptAnswer("x", "stop", len(prompt), 1, prompt_ids=prompt, output_ids=output)

    assert token_fields([answer([1, 2], [3])]) == {"prompt_token_ids": [1, 2], "token_ids": [3]}
    assert token_fields([answer([1, 2], [3, 4]), answer([1, 2, 3, 4, 5], [6])]) == {
        "input_ids": [1, 2, 3, 4, 5, 6], "loss_mask": [0, 0, 1, 1, 0, 1],
    }  # fmt: skip
    assert token_fields([answer([1, 2], [3, 4]), answer([1, 2, 9], [6])]) == {}  # the template dropped something
    assert token_fields([answer([1], None)]) == {}


def test_the_documented_flag_names(server, tmp_path):
    data = prompts(tmp_path / "in.jsonl", "one")
    port = str(server.port)
    flags = ["--data_name_or_path", str(data), "--output_dir", str(tmp_path / "out"), "--num_threads", "256",
             "--max_tokens", "64", "--base_port", port, "--max_clients", "1", "--data_shard_size", "50000",
             "--data_format", "sharegpt"]  # fmt: skip
    assert run_command("regenerate", flags) == 0
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["r0"]
    assert run_command("regenerate", [*flags, "--temperature", "0.5:0.3,1:0.3"]) == 1


def test_the_documented_script(server, tmp_path):
    """Variables on top, empty ones left out, further flags passed on, the command's own exit status."""
    data = prompts(tmp_path / "in.jsonl", "one", "one")
    repository = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "DATA_NAME_OR_PATH": str(data), "OUTPUT_DIR": str(tmp_path / "out"), "DATA_FORMAT": "sharegpt",
        "DATA_SHARD_SIZE": "1", "BASE_PORT": str(server.port), "MAX_CLIENTS": "1", "SYSTEM_PROMPT": "",
        "MODEL_NAME": "", "PYTHONPATH": str(repository), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = ["bash", str(repository / "scripts" / "speculative" / "generate_data_for_target_model.sh")]
    done = subprocess.run([*script, "--deduplicate"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["r0"]
    assert rejects_of(tmp_path / "out") == [("r1", "duplicate prompt")]
    again = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1 and "deduplicate was True, now False" in again.stderr


class InstantEngine:
    """Answers at once: what is left is the client's own memory."""

    model, concurrency, template = "instant", 64, None

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def answer(self, request):
        await asyncio.sleep(0)
        return PromptAnswer("word " * 50, "stop", 20, 50, prompt_ids=list(range(20)), output_ids=list(range(50)))


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """Peak of Python's own memory over 1800 rows against 600: what grows is 8 bytes here and there, not rows.

    The lower of two peaks: a table of the interpreter (of interned strings, say) may double within one of them.
    """
    import tracemalloc

    def peak(count: int) -> int:
        data = prompts(tmp_path / f"{count}.jsonl", *(f"question {i}" for i in range(count)))
        tracemalloc.start()
        regenerate_only(data, tmp_path / f"out{count}", "unused", shard_size=300)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    monkeypatch.setattr("fledge.commands.regenerate._engine", lambda args: InstantEngine())
    peak(200)  # imports and caches
    small, large = peak(600), min(peak(1800), peak(1801))
    assert large - small < 1200 * 400, f"{(large - small) / 1200:.0f} bytes per row, a row is 1000"


def test_a_named_template_is_for_the_engine_in_this_process():
    args = RegenerateArgs(
        prompts=PromptSourceSettings(data="x"), answers=AnswerSettings(), output_dir=Path("y"),
        engines=EngineSettings(chat_template_type="chatml"),
    )  # fmt: skip
    with pytest.raises(UserError, match="--chat-template-type chatml is for --engine transformers"):
        _engine(args)
    with_template, without = (_settings(replace(args, engines=EngineSettings(chat_template_type=name)), "m", "d", None)
                              for name in ("chatml", None))  # fmt: skip
    assert with_template["chat_template_type"] == "chatml" and "chat_template_type" not in without
