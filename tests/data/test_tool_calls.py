"""Tool calls in the rendered text: in the form that the template reads, and never lost without a word."""

import pytest

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.data.tokenize import ChatTemplate

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_a_template_does_not_lose_tool_calls_in_silence(make_tokenizer, talk):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = Conversation("c", (*talk("a"), call))
    with pytest.raises(Reject, match="untraced tool_calls: chat template 'chatml' does not render tool_calls"):
        ChatTemplate(make_tokenizer(), "chatml").encode(row)
    sample = ChatTemplate(make_tokenizer(), "chatml", untraced="train").samples(
        Conversation("c", (*talk("a", "bc"), *talk("d"), call))
    )[0]
    assert sample.untraced == ("tool_calls",)


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}ARGUMENTS]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "spelling",
    ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}", "{{ ' ' + c.function.arguments }}",
     "{% for k, v in c.function.arguments.items() %}{{ k }}: {{ v }}{% endfor %}"],
)  # fmt: skip
@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_arguments_reach_every_template_in_the_form_it_reads(make_tokenizer, talk, spelling, arguments):
    """Arguments in a string were encoded a second time by templates that write JSON themselves, which trained
    quotes and backslashes; templates that walk over a mapping refused the row."""
    template = ChatTemplate(make_tokenizer(template=CALLS.replace("ARGUMENTS", spelling)))
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*talk("a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    sample = template.encode(Conversation("c", tuple(messages)))
    written = template.tokenizer.decode(sample.input_ids[sample.loss_mask])
    inside = written.removeprefix("[f").removesuffix("]<|im_end|>").strip()
    assert inside == ("city: Oslo" if "items" in spelling else '{"city": "Oslo"}')
