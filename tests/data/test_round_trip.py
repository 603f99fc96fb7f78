"""What regeneration asks is what training shows: a fake server answers, and the regenerated rows are rendered again.

The server renders with the target's template what it was sent, as real ones do; its prompts must be the beginning of
the rows' training text, token for token. Templates: the stock ones of public models, and the named ones.
"""

import json
from pathlib import Path

import pytest
from fakes.openai_server import FakeServer, ServerThread
from regenerating import run, write
from stock_templates import CALL, EXPECTED, FAMILIES, TOOLS, save_target

from fledge.data.conversations import read_conversations
from fledge.data.rejects import Reject, Rejects
from fledge.data.samples import Sample
from fledge.data.thinking import ThinkingSwitch
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError

TALK = [("user", "one"), ("assistant", "OLD"), ("user", "two"), ("assistant", "OLD"), ("user", "three")]
SYSTEM = {"role": "system", "content": "Be brief.", "country": "no"}


@pytest.fixture
def server():
    """server(template, reply): answers without token ids, so that the text must do; where its prompt opens a thought,
    the answer holds one, as a target's does."""
    threads: list[ServerThread] = []

    def start(template: ChatTemplate, reply=lambda body: {}) -> ServerThread:
        def say(body: dict) -> dict:
            try:
                prompt = template.tokenizer.decode(prompts_sent(template, [body])[0])
            except Reject:  # the template of this server is less strict
                return reply(body)
            thought = {"reasoning_content": "Hm."} if prompt.rstrip().endswith("<think>") else {}
            said = reply(body)
            return said | {"message": thought | said.get("message", {})}

        threads.append(ServerThread(FakeServer(is_vllm=False, reply=say)))
        return threads[-1]

    yield start
    for thread in threads:
        thread.stop()


@pytest.fixture
def target(make_tokenizer, tmp_path):
    """target(name): the saved target whose template this is."""

    def save(name: str) -> ChatTemplate:
        save_target(name, make_tokenizer, tmp_path / "target")
        return ChatTemplate.from_pretrained(str(tmp_path / "target"))

    return save


def rows(folder: Path, *head: dict, **fields) -> Path:
    messages = [*head, *({"role": role, "content": content} for role, content in TALK)]
    return write(folder / "in.jsonl", [{"id": "a", "messages": messages, "meta": {"own": 1}, **fields}])


def prompts_sent(template: ChatTemplate, bodies: list[dict]) -> list[list[int]]:
    """What a server with this template read, of each request."""
    told = [{**body.get("chat_template_kwargs", {}), **({"tools": body["tools"]} if "tools" in body else {})}
            for body in bodies]  # fmt: skip
    return [template.prompt_ids(body["messages"], **each) for body, each in zip(bodies, told, strict=True)]


def samples_of(template: ChatTemplate, out: Path) -> list[Sample]:
    (read,) = read_conversations(str(out), rejects=Rejects())
    return template.samples(read)


def begins_with(prompt: list[int], sample: Sample) -> bool:
    """Whether a sample begins with exactly this prompt, of which the last token is not supervised, and goes on with
    what the assistant wrote."""
    begin = sample.input_ids[: len(prompt)].tolist() == prompt
    return begin and bool(sample.loss_mask[len(prompt) :].any()) and not sample.loss_mask[len(prompt) - 1]


def switch_of(template: ChatTemplate) -> ThinkingSwitch | None:
    try:
        return ThinkingSwitch.of(template)
    except UserError:
        return None


def check(template: ChatTemplate, thread: ServerThread, data: Path, out: Path, **choices) -> dict:
    """Regenerate; every prompt that was sent must begin a sample. Returns the row."""
    (row,) = run(data, out, thread.url, **choices)
    assert "OLD" not in json.dumps(row) and not {"token_ids", "input_ids"} & row.keys()
    samples = samples_of(template, out)
    for prompt in prompts_sent(template, thread.server.bodies):
        assert any(begins_with(prompt, sample) for sample in samples), template.tokenizer.decode(prompt)
    return row


@pytest.mark.parametrize("column", ["turns", "system"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_training_is_the_prompt_that_was_sent(target, server, tmp_path, name, column):
    template = target(name)
    thread = server(template)
    data = rows(tmp_path, *([SYSTEM] if column == "system" else []))
    if EXPECTED[name][column].startswith("REJECT"):
        run(data, tmp_path / "out", thread.url)
        with pytest.raises(Reject):
            samples_of(template, tmp_path / "out")
        return
    check(template, thread, data, tmp_path / "out")
    assert len(thread.server.bodies) == 3
    bodies = [{**body, "messages": [{"role": "user", "content": "0"}]} for body in thread.server.bodies]
    samples = samples_of(template, tmp_path / "out")
    assert not any(begins_with(prompts_sent(template, bodies)[0], sample) for sample in samples)  # it can fail


@pytest.mark.parametrize("thinking", ["on", "off"])
@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_on_and_off_reach_the_prompt_and_the_training_text(target, server, tmp_path, name, thinking):
    template = target(name)
    thread = server(template)
    data, choice = rows(tmp_path), {"prompt": {"target": str(tmp_path / "target")}, "answer": {"thinking": thinking}}
    switch = switch_of(template)
    if switch is None:
        with pytest.raises(UserError, match="the same with thinking on and off"):
            run(data, tmp_path / "out", thread.url, **choice)
        return
    row = check(template, thread, data, tmp_path / "out", **choice)
    assert row["chat_template_kwargs"] == switch.kwargs(thinking == "on") and row["thinking"] == (thinking == "on")


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_supervised_behind_the_prompt_that_was_sent(target, server, tmp_path, name):
    """Templates drop the thoughts of earlier turns from later prompts: each turn trains behind the prompt it was given,
    or the row is rejected because the template renders no thoughts."""
    template = target(name)
    thread = server(template, lambda body: {"message": {"reasoning_content": f"thought {len(body['messages'])}"}})
    data, choice = rows(tmp_path), {}
    if switch_of(template):
        choice = {"prompt": {"target": str(tmp_path / "target")}, "answer": {"thinking": "on"}}
    if EXPECTED[name]["thought"].startswith("REJECT"):
        run(data, tmp_path / "out", thread.url, **choice)
        with pytest.raises(Reject):
            samples_of(template, tmp_path / "out")
        return
    check(template, thread, data, tmp_path / "out", **choice)
    samples = samples_of(template, tmp_path / "out")
    words = [template.tokenizer.decode(sample.input_ids[sample.loss_mask]) for sample in samples]
    assert any("thought 5" in text for text in words)


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_reach_the_prompt_and_the_training_text(target, server, tmp_path, name):
    def reply(body: dict) -> dict:
        answered = body["messages"][-1]["role"] == "tool"
        return {} if answered else {"message": {"content": None, "tool_calls": [CALL]}, "finish_reason": "tool_calls"}

    old = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    head = [SYSTEM] if name == "llama3_1" else []  # its template writes the tools into the system message
    messages = [
        *head,
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [old]},
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "assistant", "content": "OLD"},
    ]
    template = target(name)
    thread = server(template, reply)
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": messages, "tools": TOOLS}])
    if EXPECTED[name]["tools"].startswith("REJECT"):
        run(data, tmp_path / "out", thread.url)
        with pytest.raises(Reject):
            samples_of(template, tmp_path / "out")
        return
    row = check(template, thread, data, tmp_path / "out")
    assert [message["role"] for message in row["messages"]][-4:] == ["user", "assistant", "tool", "assistant"]
    bare = [{name: value for name, value in body.items() if name != "tools"} for body in thread.server.bodies]
    samples = samples_of(template, tmp_path / "out")
    assert not any(begins_with(prompts_sent(template, bare)[0], sample) for sample in samples)  # it can fail


def test_an_answer_cut_while_reasoning_trains_without_an_end(target, server, tmp_path):
    template = target("qwen3")
    cut = {"message": {"content": None, "reasoning_content": "Let me see"}, "finish_reason": "length"}
    thread = server(template, lambda body: cut)
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": [{"role": "user", "content": "one"}]}])
    check(template, thread, data, tmp_path / "out")
    (sample,) = samples_of(template, tmp_path / "out")
    assert template.tokenizer.decode(sample.input_ids[sample.loss_mask]) == "<think>\nLet me see"


def test_the_families_that_have_a_switch(target):
    has = {name for name in FAMILIES if switch_of(target(name))}
    assert has == {
        "qwen3", "qwen3_5", "qwen3_8", "gpt_oss", "gemma4", "gemma4_large", "glm4_5", "deepseek_v3_1", "hunyuan_dense",
        "hunyuan_moe", "granite3", "smollm3", "nemotron3_nano",
    }  # fmt: skip
