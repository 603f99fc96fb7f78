"""What the assistant wrote, as characters of a rendering: no tokenizer."""

import re

import pytest

from fledge.data.spans import Unmaskable, answer_end, supervised_renderings

END = ("<end>", "<eos>")


def said(renderings) -> list[list[str]]:
    return [[r.text[start:end] for start, end in r.spans] for r in renderings]


def consistent(messages, add_generation_prompt):
    text = "".join(f"<{m['role']}>{m['content']}<end>\n" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def forgets_thoughts(messages, add_generation_prompt):
    """Like Qwen3: an old turn loses its thought, the last one always has one, if only an empty one."""
    text = ""
    for index, message in enumerate(messages):
        thought, _, words = message["content"].rpartition("</think>")
        thought = f"{thought}</think>" if thought else "<think>\n</think>"
        keeps = message["role"] == "assistant" and index == len(messages) - 1
        text += f"<{message['role']}>{thought if keeps else ''}{words}<end>\n"
    return text + ("<assistant>" if add_generation_prompt else "")


def opens_a_thought(messages, add_generation_prompt):
    """Like R1: the generation prompt opens a thought that the rendered answer does not have."""
    return consistent(messages, False) + ("<assistant><think>\n" if add_generation_prompt else "")


def closes_with_eos(messages, add_generation_prompt):
    """Like Phi-3: a second control token ends the text, not the turn."""
    return consistent(messages, add_generation_prompt) + ("" if add_generation_prompt else "<eos>")


def test_every_turn_of_a_consistent_template_is_supervised_at_once(talk):
    renderings = supervised_renderings(talk("a", "b", "c", "d", system="s"), consistent, END)
    assert said(renderings) == [["b<end>", "d<end>"]] and renderings[0].turn is None


def test_what_follows_the_last_answer_is_left_out(talk):
    assert supervised_renderings(talk("a", "b", "c"), consistent, END)[0].text == consistent(talk("a", "b"), False)


def test_turns_the_template_rewrites_become_renderings_of_their_own(talk):
    messages = talk("a", "<think>1</think>b", "c", "<think>2</think>d")
    renderings = supervised_renderings(messages, forgets_thoughts, END)
    assert said(renderings) == [["<think>2</think>d<end>"], ["<think>1</think>b<end>"]]
    assert [r.turn for r in renderings] == [None, 1]
    assert "<think>1" not in renderings[0].text  # what the target sees when it writes the last turn


def test_an_empty_thought_the_template_inserts_is_not_the_assistants(talk):
    assert said(supervised_renderings(talk("a", "b"), forgets_thoughts, END)) == [["b<end>"]]


def test_the_turn_ends_at_the_first_control_token(talk):
    assert said(supervised_renderings(talk("a", "b"), closes_with_eos, END)) == [["b<end>"]]


def test_a_prompt_that_is_no_prefix_is_refused_with_both_texts(talk):
    with pytest.raises(
        Unmaskable, match=re.escape(r"turn 1: the prompt renders as ...'<user>a<end>\n<assistant><think")
    ):
        supervised_renderings(talk("a", "b"), opens_a_thought, END)


def test_an_answer_cut_by_the_length_limit_has_no_end_of_turn(talk):
    messages = talk("a", "b", "c", "d")
    messages[3]["finish_reason"] = "length"
    assert said(supervised_renderings(messages, consistent, END)) == [["b<end>", "d"]]


@pytest.mark.parametrize(
    ("text", "words", "turn"),
    [
        ("P hello<end>\n", "hello", "hello<end>"),
        ("P hello <end> <eos>\n", "hello", "hello <end>"),
        ("P hello\n", "hello", "hello"),
        ("P <end>", "", "<end>"),
        ("P a<end>b<end>", "a<end>b", "a<end>b<end>"),
    ],
)
def test_answer_end(text, words, turn):
    content_end, turn_end = answer_end(text, 2, END)
    assert (text[2:content_end], text[2:turn_end]) == (words, turn)
