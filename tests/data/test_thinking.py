"""The thinking switch of every family, found by rendering."""

import pytest

from fledge.data.thinking import ThinkingSwitch
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError

QUESTION = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n"
FAMILIES = {
    "Qwen3, GLM-4.5, Hunyuan": (
        QUESTION + OPEN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
        {"enable_thinking": True},
    ),
    "DeepSeek V3.1": (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + QUESTION + OPEN
        + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
        {"thinking": True},
    ),
    "Granite 3.3": (
        "{% if thinking %}<|im_start|>system\nWrite your thoughts first.<|im_end|>\n{% endif %}" + QUESTION + OPEN
        + "{% endif %}",
        {"thinking": True},
    ),
    "Command A": (
        QUESTION + OPEN + "{% if reasoning %}<|START_THINKING|>{% endif %}{% endif %}", {"reasoning": True},
    ),
    "gpt-oss": (
        "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
        "<|im_start|>system\nReasoning: {{ reasoning_effort }}<|im_end|>\n" + QUESTION + OPEN + "{% endif %}",
        {"reasoning_effort": "high"},
    ),
    "Mistral Small 4": (
        "{% if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('none or high') }}{% endif %}"
        "<|im_start|>system\n{{ reasoning_effort }}<|im_end|>\n" + QUESTION + OPEN + "{% endif %}",
        {"reasoning_effort": "high"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, on", FAMILIES.values(), ids=FAMILIES)
def test_the_switch_is_the_one_that_changes_the_prompt(make_tokenizer, text, on):
    """`enable_thinking` was sent to every template: DeepSeek, Granite and gpt-oss passed over it, and rows that said
    thinking was off had been answered as if nothing had been asked."""
    switch = ThinkingSwitch.of(ChatTemplate(make_tokenizer(template=text)))
    assert switch.kwargs(True) == on and switch.kwargs(False).keys() == on.keys() and switch.kwargs(None) == {}
    assert switch.kwargs(False) != on


def test_a_template_without_a_switch_is_named(make_tokenizer):
    with pytest.raises(UserError, match="the same with thinking on and off .*enable_thinking.*Leave --thinking"):
        ThinkingSwitch.of(ChatTemplate(make_tokenizer(template=QUESTION + OPEN + "{% endif %}")))


def test_a_variable_that_only_fills_a_thought_is_no_switch(make_tokenizer):
    """LFM2.5 calls its own variable `thinking`: the name stands in the text, and changes nothing when it is given."""
    text = (
        "{% for m in messages %}{% set thinking = m.reasoning_content %}{% endfor %}" + QUESTION + OPEN + "{% endif %}"
    )
    with pytest.raises(UserError, match="the same with thinking on and off"):
        ThinkingSwitch.of(ChatTemplate(make_tokenizer(template=text)))
