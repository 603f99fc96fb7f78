"""Fields that a template does not render are found; those that it renders, in whatever form, are not."""

import json

import pytest

from fledge.data.conversations import Conversation
from fledge.data.dataset import TokenizedData
from fledge.data.rejects import Reject
from fledge.data.tokenize import ChatTemplate
from fledge.data.traces import reasoning_name, refuse_untraced
from fledge.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
MESSAGES = (
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3 degrees"},
)  # fmt: skip
META = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True, "mood": "good"}}
READS_ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking %}{% endif %}{% if mood %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lost(make_tokenizer, template: str | None = None, messages=MESSAGES, meta=META) -> set[str]:
    tokenizer = make_tokenizer(template=template) if template else make_tokenizer()
    chat_template = ChatTemplate(tokenizer, untraced="train")
    return set(chat_template.samples(Conversation("c", messages, meta))[0].untraced)


def test_a_template_that_reads_everything_loses_nothing(make_tokenizer):
    assert lost(make_tokenizer, READS_ALL) == set()


def test_plain_chatml_loses_tools_calls_reasoning_and_arguments(make_tokenizer):
    """Rows with these trained on texts that the target never saw, and nothing said so."""
    assert lost(make_tokenizer) == {
        "tools", "tool_calls", "reasoning_content", "chat_template_kwargs.enable_thinking", "chat_template_kwargs.mood",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("removed", "field"),
    [
        ("{{ m.reasoning_content }}", "reasoning_content"),
        ("{% if mood %}{% endif %}", "chat_template_kwargs.mood"),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", "tools"),
    ],
)
def test_each_field_is_found_alone(make_tokenizer, removed, field):
    assert lost(make_tokenizer, READS_ALL.replace(removed, "")) == {field}


@pytest.mark.parametrize(("role", "field"), [("system", "system"), ("tool", "content of tool")])
def test_messages_of_a_role_that_a_template_skips(make_tokenizer, role, field):
    skips = READS_ALL.replace("{{ m.content }}", f"{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}")
    assert lost(make_tokenizer, skips) == {field}


def test_a_content_that_is_rendered_in_another_form_is_traced(make_tokenizer):
    quoted = READS_ALL.replace("{{ m.content }}", "{{ m.content | tojson }}")
    told = ({"role": "user", "content": 'Say "hi"\n'}, {"role": "assistant", "content": "hi"})
    assert lost(make_tokenizer, quoted, told, {}) == set()


def test_reasoning_is_given_under_the_name_that_a_template_reads(make_tokenizer):
    """gpt-oss reads `thinking`; the reasoning of rows that call it reasoning_content was lost there."""
    assert lost(make_tokenizer, READS_ALL.replace("reasoning_content", "thinking")) == set()
    assert reasoning_name("{{ m.thinking }}") == "thinking" and reasoning_name("{{ m.content }}") == "reasoning_content"


def test_rows_are_rejected_by_the_field_unless_told_otherwise(make_tokenizer):
    with pytest.raises(Reject) as caught:
        ChatTemplate(make_tokenizer()).encode(Conversation("c", MESSAGES, {}))
    assert caught.value.reason == "untraced reasoning_content"
    assert "template 'own' does not render reasoning_content, tool_calls" in caught.value.detail
    refuse_untraced(["chat_template_kwargs.mood"], "own", "reject")  # an argument is no text: counted, not rejected
    refuse_untraced(["tools"], "own", "train")


@pytest.fixture
def rows_with_reasoning(write_rows, talk):
    plain = [{"id": i, "messages": talk(f"q{i}", f"answer {i}")} for i in range(4)]
    thought = {"role": "assistant", "content": "answer", "reasoning": "Hm."}
    return write_rows([*plain, {"id": "r", "messages": [*talk("q"), thought]}])


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_counts_reach_the_report(make_tokenizer, rows_with_reasoning, num_proc, capsys):
    template = ChatTemplate(make_tokenizer(), untraced="train")
    data = TokenizedData.from_path(str(rows_with_reasoning), template, cache_dir=None, num_proc=num_proc)
    assert data.report.untraced == {"reasoning_content": 1} and data.report.kept == 5
    assert "chat template 'own' does not render reasoning_content, which 1 rows have" in capsys.readouterr().err


def test_the_policy_is_part_of_the_cache(make_tokenizer, rows_with_reasoning, tmp_path):
    """Data tokenised with --untraced train must not be found again by a run that rejects such rows."""
    tokenizer = make_tokenizer()
    kept = TokenizedData.from_path(
        str(rows_with_reasoning), ChatTemplate(tokenizer, untraced="train"), cache_dir=tmp_path / "cache"
    )
    assert len(kept) == 5
    with pytest.raises(UserError, match="untraced reasoning_content"):
        TokenizedData.from_path(str(rows_with_reasoning), ChatTemplate(tokenizer), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "written",
    ["{{ a | tojson }}", "{{ a }}", "{{ '' + a }}", "{{ a if a is string else a | tojson }}",
     "{% for k, v in a.items() %}<{{ k }}>{{ v }}{% endfor %}"],
)  # fmt: skip
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_are_decoded_or_encoded_once(make_tokenizer, written, given):
    """Qwen's and Llama's templates encoded arguments that were text a second time."""
    tokenizer = make_tokenizer(
        template="{% for m in messages %}{% if m.tool_calls %}{% set a = m.tool_calls[0].function.arguments %}"
        + written + "{% endif %}{% endfor %}"
    )  # fmt: skip
    template = ChatTemplate(tokenizer)
    call = {"type": "function", "function": {"name": "weather", "arguments": given}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = template.render(messages)
    assert text == ("<city>Oslo" if "items" in written else json.dumps({"city": "Oslo"}))
