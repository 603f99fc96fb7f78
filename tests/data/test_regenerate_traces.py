"""Regeneration says which fields of a prompt its target never sees, where the chat template is at hand."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from fledge.data.conversations import Conversation
from fledge.data.sampling import ExtraSampling
from fledge.data.tokenize import ChatTemplate
from fledge.regeneration.args import AnswerArgs, PromptSourceArgs
from fledge.regeneration.engine import PromptAnswer
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
    asker = Asker(PromptSourceArgs(data_name_or_path="x"), AnswerArgs(), engine, ExtraSampling())
    asked = Conversation("a", ({"role": "user", "content": "What weather?"},), {"tools": TOOLS})
    row = asyncio.run(asker.row(asked))
    assert row.get("untraced", []) == lost and row["tools"] == TOOLS
    assert {name for name in tally(row) if name.startswith("untraced")} == {f"untraced: {name}" for name in lost}
    plain = asyncio.run(asker.row(Conversation("b", ({"role": "user", "content": "Hi"},))))
    assert "untraced" not in plain  # nothing beside the question
