"""What the assistant wrote, as characters of a rendering: no tokenizer."""

import re

import pytest

from fledge.data import spans
from fledge.data.spans import Ends, Unmaskable, answer_end, trained_answers

ENDS = Ends(("<end>", "<eos>"), ("<end>",))


def supervised_renderings(messages, render, ends=ENDS):
    return spans.supervised_renderings(messages, trained_answers(messages), render, ends)


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
    renderings = supervised_renderings(talk("a", "b", "c", "d", system="s"), consistent)
    assert said(renderings) == [["b<end>", "d<end>"]] and renderings[0].turn is None


def test_what_follows_the_last_answer_is_left_out(talk):
    assert supervised_renderings(talk("a", "b", "c"), consistent)[0].text == consistent(talk("a", "b"), False)


def test_turns_the_template_rewrites_become_renderings_of_their_own(talk):
    messages = talk("a", "<think>1</think>b", "c", "<think>2</think>d")
    renderings = supervised_renderings(messages, forgets_thoughts)
    assert said(renderings) == [["<think>2</think>d<end>"], ["<think>1</think>b<end>"]]
    assert [r.turn for r in renderings] == [None, 1]
    assert "<think>1" not in renderings[0].text  # what the target sees when it writes the last turn


def test_an_empty_thought_the_template_inserts_is_not_the_assistants(talk):
    assert said(supervised_renderings(talk("a", "b"), forgets_thoughts)) == [["b<end>"]]


def test_the_turn_ends_at_the_first_token_that_stops(talk):
    assert said(supervised_renderings(talk("a", "b"), closes_with_eos)) == [["b<end>"]]
    only_eos = Ends(("<end>", "<eos>"), ("<eos>",))
    assert said(supervised_renderings(talk("a", "b"), closes_with_eos, only_eos)) == [["b<end>\n<eos>"]]


def test_a_thought_the_prompt_opens_may_be_missing_from_the_answer(talk):
    """Once every row of such a template was refused, because the prompt is no beginning of the rendered answer."""
    assert said(supervised_renderings(talk("a", "b"), opens_a_thought)) == [["b<end>"]]
    thought, missing = supervised_renderings(talk("a", "b"), opens_a_thought)[0].text, "<think>"
    assert missing not in thought


def test_a_prompt_that_is_no_prefix_is_refused_with_both_texts(talk):
    with pytest.raises(
        Unmaskable, match=re.escape(r"turn 1: the prompt renders as ...'<user>a<end>\n<model>' but with its answer")
    ):
        supervised_renderings(talk("a", "b"), lambda m, ask: consistent(m, False) + ("<model>" if ask else ""))


def opens_the_next_turn(messages, add_generation_prompt):
    """Like GLM: no token ends a turn, the target stops by writing the opener of the next one."""
    text = "".join(f"<{m['role']}>\n{m['content']}" for m in messages)
    return text + ("<assistant>\n" if add_generation_prompt else "")


OPENERS = Ends(("<assistant>", "<user>", "<tool>"), ("<tool>", "<user>"))


def test_the_opener_of_the_next_turn_ends_this_one(talk):
    """Once nothing ended the last answer of such a template, and its other answers ended with their words."""
    renderings = supervised_renderings(talk("a", "b", "c", "d"), opens_the_next_turn, OPENERS)
    assert said(renderings) == [["b<user>", "d<user>"]]
    assert renderings[0].text.endswith("<assistant>\nd<user>")
    call = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "r"}
    assert said(supervised_renderings([*talk("a"), call], opens_the_next_turn, OPENERS)) == [["x<tool>"]]
    told = [*talk("a"), call, result, *talk("-", "b")[1:]]
    assert said(supervised_renderings(told, opens_the_next_turn, OPENERS)) == [["x<tool>", "b<user>"]]


def test_no_opener_ends_an_answer_that_was_cut(talk):
    messages = talk("a", "b")
    messages[1]["finish_reason"] = "length"
    assert said(supervised_renderings(messages, opens_the_next_turn, OPENERS)) == [["b"]]


def test_answers_a_row_excludes(talk):
    messages = talk("a", "b", "c", "d")
    messages[1]["train"] = False
    assert said(supervised_renderings(messages, consistent)) == [["d<end>"]]
    assert trained_answers(messages) == [3] and trained_answers(talk("a", "b", "c", "d"), last_turn_only=True) == [3]
    messages[3]["train"] = False
    assert trained_answers(messages) == [] == trained_answers(messages, last_turn_only=True)


def test_an_answer_cut_by_the_length_limit_has_no_end_of_turn(talk):
    messages = talk("a", "b", "c", "d")
    messages[3]["finish_reason"] = "length"
    assert said(supervised_renderings(messages, consistent)) == [["b<end>", "d"]]


@pytest.mark.parametrize(
    ("text", "words", "turn", "stops"),
    [
        ("P hello<end>\n", "hello", "hello<end>", True),
        ("P hello <call> <end> <eos>\n", "hello", "hello <call> <end>", True),
        ("P hello<call>\n<eos>", "hello", "hello<call>", False),
        ("P hello\n", "hello", "hello", False),
        ("P <end>", "", "<end>", True),
        ("P a<end>b<end>", "a<end>b", "a<end>b<end>", True),
    ],
)
def test_answer_end(text, words, turn, stops):
    """The stop token is the end; once the first control token was, and LFM2's calls never stopped (<|tool_call_end|>
    stands before its <|im_end|>)."""
    end = answer_end(text, 2, Ends(("<call>", "<end>", "<eos>"), ("<end>",)))
    assert (text[2 : end.words], text[2 : end.turn], end.stops) == (words, turn, stops)
