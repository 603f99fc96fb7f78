"""What regeneration asks is what training shows: a fake server answers, and the regenerated rows are rendered again.

The server renders with the target's template what it was sent, as real ones do; its prompts must be the beginning of
the rows' training text, token for token.
"""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from fakes.openai_server import FakeServer, ServerThread
from regenerating import run, write

from fledge.data.conversations import read_conversations
from fledge.data.rejects import Rejects
from fledge.data.samples import Sample
from fledge.data.templates import TEMPLATES
from fledge.data.thinking import ThinkingSwitch
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError

NAMED = {file: control for variants in TEMPLATES.values() for file, control in variants}
MESSAGES = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OTHERS = {  # the switches of families whose templates are not among the named ones, and tools
    "thinking": (  # DeepSeek V3.1: the mark of an answer without thoughts is part of its prompt, and of no later one
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>' if thinking else '</think>' }}{% endif %}"
    ),
    "reasoning_effort": (
        "<|im_start|>system\nReasoning: {{ reasoning_effort | default('medium') }}<|im_end|>\n" + MESSAGES
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "tools": (
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments }}</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}  # fmt: skip
TALK = [("user", "one"), ("assistant", "OLD"), ("user", "two"), ("assistant", "OLD"), ("user", "three")]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def server():
    threads: list[ServerThread] = []

    def start(reply=None) -> ServerThread:
        threads.append(ServerThread(FakeServer(is_vllm=False, reply=reply)))  # no token ids: the text must do
        return threads[-1]

    yield start
    for thread in threads:
        thread.stop()


def conversation(system: bool) -> list[dict]:
    head = [{"role": "system", "content": "Be brief.", "country": "no"}] if system else []
    return head + [{"role": role, "content": content} for role, content in TALK]


def sent_and_trained(template: ChatTemplate, bodies: list[dict], out: Path) -> list[tuple[list[int], list[Sample]]]:
    """Per request the prompt its server saw, and the samples of the row that came of all of them."""
    (read,) = read_conversations(str(out), rejects=Rejects())
    samples = template.samples(read)
    prompts = []
    for body in bodies:
        told = {**body.get("chat_template_kwargs", {}), **({"tools": body["tools"]} if "tools" in body else {})}
        prompts.append(template.prompt_ids(body["messages"], **told))
    return [(prompt, samples) for prompt in prompts]


def begins_with(prompt: list[int], sample: Sample) -> bool:
    """Whether a sample holds exactly this prompt, and what it supervises next comes behind it."""
    begin = sample.input_ids[: len(prompt)].tolist() == prompt
    return begin and bool(sample.loss_mask[len(prompt) :].any()) and not sample.loss_mask[len(prompt) - 1]


def check(template: ChatTemplate, thread: ServerThread, data: Path, out: Path, **choices) -> dict:
    (row,) = run(data, out, thread.url, **choices)
    assert "OLD" not in json.dumps(row) and not {"token_ids", "input_ids"} & row.keys()
    for prompt, samples in sent_and_trained(template, thread.server.bodies, out):
        assert any(begins_with(prompt, sample) for sample in samples), template.tokenizer.decode(prompt)
    return row


def saved(make_tokenizer, text: str, control: tuple[str, ...], folder: Path) -> ChatTemplate:
    make_tokenizer(tuple(dict.fromkeys(control)), text, eos=control[-1]).save_pretrained(folder)
    return ChatTemplate.from_pretrained(str(folder))


@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
@pytest.mark.parametrize("name", NAMED)
def test_the_prompt_of_training_is_the_prompt_that_was_sent(make_tokenizer, server, tmp_path, name, system):
    text = (files("fledge.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = saved(make_tokenizer, text, NAMED[name], tmp_path / "target")
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": conversation(system), "meta": {"own": 1}}])
    thread = server()
    check(template, thread, data, tmp_path / "out")
    assert len(thread.server.bodies) == 3


@pytest.mark.parametrize("thinking", ["on", "off"])
@pytest.mark.parametrize("name", [*NAMED, "thinking", "reasoning_effort"])
def test_thinking_on_and_off_reach_the_prompt_and_the_training_text(make_tokenizer, server, tmp_path, name, thinking):
    named = name in NAMED
    text = (files("fledge.data") / "templates" / f"{name}.jinja").read_text("utf-8") if named else OTHERS[name]
    control = NAMED[name] if named else ("<|im_start|>", "<|im_end|>")
    template = saved(make_tokenizer, text, control, tmp_path / "target")
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": conversation(True)}])
    thread, choice = server(), {"prompt": {"tokenizer": str(tmp_path / "target")}, "answer": {"thinking": thinking}}
    try:
        switch = ThinkingSwitch.of(template)
    except UserError:
        with pytest.raises(UserError, match="the same with thinking on and off"):
            run(data, tmp_path / "out", thread.url, **choice)
        return
    row = check(template, thread, data, tmp_path / "out", **choice)
    assert row["chat_template_kwargs"] == switch.kwargs(thinking == "on") and row["thinking"] == (thinking == "on")
    if name in OTHERS:  # elsewhere one prompt is the beginning of the other
        bodies = [{**body, "chat_template_kwargs": switch.kwargs(thinking != "on")} for body in thread.server.bodies]
        (prompt, samples), *_ = sent_and_trained(template, bodies, tmp_path / "out")
        assert not any(begins_with(prompt, sample) for sample in samples)  # the check can fail


def test_thoughts_are_supervised_behind_the_prompt_that_was_sent(make_tokenizer, server, tmp_path):
    """Qwen3 drops the thoughts of earlier turns from later prompts: each turn trains behind the prompt it was given."""
    text = (files("fledge.data") / "templates" / "qwen3.jinja").read_text("utf-8")
    template = saved(make_tokenizer, text, NAMED["qwen3"], tmp_path / "target")
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": conversation(True)}])
    thread = server(lambda body: {"message": {"reasoning_content": f"thought {len(body['messages'])}"}})
    check(template, thread, data, tmp_path / "out", prompt={"tokenizer": str(tmp_path / "target")})
    (read,) = read_conversations(str(tmp_path / "out"), rejects=Rejects())
    words = [template.tokenizer.decode(s.input_ids[s.loss_mask]) for s in template.samples(read)]
    assert all(any(f"<think>\nthought {n}\n</think>" in text for text in words) for n in (2, 4, 6))


def test_tools_reach_the_prompt_and_the_training_text(make_tokenizer, server, tmp_path):
    template = saved(make_tokenizer, OTHERS["tools"], ("<|im_start|>", "<|im_end|>"), tmp_path / "target")

    def reply(body: dict) -> dict:
        if body["messages"][-1]["role"] == "tool":
            return {}
        function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        message = {"content": None, "tool_calls": [{"id": "new", "type": "function", "function": function}]}
        return {"message": message, "finish_reason": "tool_calls"}

    call = {"id": "old", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "old"},
        {"role": "assistant", "content": "OLD"},
    ]
    data = write(tmp_path / "in.jsonl", [{"id": "a", "messages": messages, "tools": [WEATHER]}])
    thread = server(reply)
    row = check(template, thread, data, tmp_path / "out")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    bare = [{name: value for name, value in body.items() if name != "tools"} for body in thread.server.bodies]
    (prompt, samples), *_ = sent_and_trained(template, bare, tmp_path / "out")
    assert not any(begins_with(prompt, sample) for sample in samples)  # the check can fail
