"""Regeneration says which fields of a prompt its target never sees, where the chat template is at hand."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from fakes.openai_server import FakeServer, ServerThread
from regenerating import run, write

from fledge.data.conversations import Conversation
from fledge.data.sampling import ExtraSampling
from fledge.data.tokenize import ChatTemplate
from fledge.regeneration.engine import PromptAnswer
from fledge.regeneration.settings import AnswerSettings, PromptSourceSettings
from fledge.regeneration.turns import Asker, tally

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("template, lost", [(PLAIN, ["tools"]), ("{{ tools | tojson }}" + PLAIN, [])])
def test_a_tool_that_the_template_drops_is_counted(make_tokenizer, template, lost):
    """A target whose template ignores tools answered without them, and no word was said."""

    async def answer(request) -> PromptAnswer:
        return PromptAnswer("fine", "stop", 3, 1)

    chat = ChatTemplate(make_tokenizer(template=template))
    engine = SimpleNamespace(model="target", template=chat, errors=Counter(), answer=answer)
    asker = Asker(PromptSourceSettings(data="x"), AnswerSettings(), engine, ExtraSampling())
    asked = Conversation("a", ({"role": "user", "content": "What weather?"},), {"tools": TOOLS})
    row = asyncio.run(asker.row(asked))
    assert row.get("untraced", []) == lost and row["tools"] == TOOLS
    assert {name for name in tally(row) if name.startswith("untraced")} == {f"untraced: {name}" for name in lost}
    plain = asyncio.run(asker.row(Conversation("b", ({"role": "user", "content": "Hi"},))))
    assert "untraced" not in plain  # nothing beside the question


ASKED = {
    "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}],
    "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True, "mood": "glad"},
}  # fmt: skip
FIELDS = {"system", "tools", "chat_template_kwargs.enable_thinking", "chat_template_kwargs.mood"}


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """answered(renders, rows, prompt): the rows that a server of an unknown model answers, and the server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads: list[ServerThread] = []

    def run_against(renders: tuple[str, ...] | None, rows: list[dict], prompt: dict | None = None):
        threads.append(ServerThread(FakeServer(renders=renders)))
        data = write(tmp_path / "data.jsonl", [{"id": f"r{i}", **row} for i, row in enumerate(rows)])
        return run(data, tmp_path / "out", threads[-1].url, prompt=prompt), threads[-1].server

    yield run_against
    for thread in threads:
        thread.stop()


@pytest.mark.parametrize("drops", [(), *((name,) for name in sorted(FIELDS)), tuple(sorted(FIELDS))])
def test_a_server_is_asked_what_its_template_does_with_a_field(answered, drops, capsys):
    """Without the template on this machine, regenerate could not see that the target never saw a field."""
    renders = tuple(name.removeprefix("chat_template_kwargs.") for name in FIELDS - set(drops))
    rows, server = answered(renders, [ASKED, ASKED, ASKED])
    assert [set(row.get("untraced", ())) for row in rows] == [set(drops)] * 3
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"3 rows have {name}, which the chat template does not render" in said for name in drops)
    assert "does not tell" not in said and server.num_tokenized <= 3 * len(FIELDS), "once for each field, not each row"


def test_a_system_prompt_of_the_flag_is_looked_for_too(answered):
    rows, _ = answered((), [{"conversations": [{"from": "human", "value": "Hi"}]}], {"system": "Be brief."})
    assert rows[0]["untraced"] == ["system"]


def test_a_server_that_does_not_tell_is_named_once(answered, capsys):
    rows, _ = answered(None, [ASKED, ASKED])
    said = " ".join(capsys.readouterr().err.split())
    assert all("untraced" not in row for row in rows)
    assert all(said.count(f"does not tell what its chat template makes of {name},") == 1 for name in FIELDS)
    assert "--target" in said


def test_plain_questions_ask_nothing_more(answered):
    _, server = answered((), [{"conversations": [{"from": "human", "value": "Hi"}]}])
    assert server.num_tokenized == 0


def test_a_template_on_this_machine_is_read_instead(answered, target_dir):
    rows, server = answered((), [ASKED], {"target": str(target_dir)})
    assert server.num_tokenized == 0 and "tools" in rows[0]["untraced"] and "system" not in rows[0]["untraced"]
