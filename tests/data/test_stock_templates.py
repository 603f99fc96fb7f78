"""What is supervised under the stock templates of public models, as their targets would have written it.

The expectations (`chat_templates/expected.yaml`) follow the models' documented formats, not our code: the words, the
control tokens among them, and the token at which the model stops. Turns that become samples of their own come last.
"""

import numpy as np
import pytest
from stock_templates import CALL, EXPECTED, FAMILIES, FOLDERS, LFM, TOOLS, stock_tokenizer, stop_ids

from fledge.data.conversations import parse_row
from fledge.data.rejects import Reject
from fledge.data.rows import Row
from fledge.data.tokenize import ChatTemplate

OFF = {"enable_thinking": False, "thinking": False}


def ask(question: str, answer: str, **fields: object) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


TWO_TURNS = [*ask("1?", "A."), *ask("2?", "B.")]
ROWS = {
    "plain": {"messages": ask("Hi", "Six.")},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *ask("Hi", "Six.")]},
    "turns": {"messages": TWO_TURNS},
    "tools": {"tools": TOOLS, "messages": [
        *ask("Cold?", "", tool_calls=[CALL]),
        {"role": "tool", "content": "-3", "tool_call_id": "abcdefghi", "name": "weather"},
        {"role": "assistant", "content": "Yes."}]},
    "thought": {"messages": [
        *ask("1?", "A.", reasoning_content="Ha."), *ask("2?", "B.", reasoning_content="Hb.")]},
    "in content": {"messages": ask("Hi", "<think>\nHm.\n</think>\n\nSix.")},
    "thinking off": {"messages": TWO_TURNS, "chat_template_kwargs": OFF},
    "empty": {"messages": ask("Hi", "<think>\n\n</think>\n\nSix.")},
    "cut": {"messages": ask("Hi", "Six."), "finish_reason": "length"},
    "cut thought": {"messages": ask("Hi", "", reasoning_content="Hm."), "finish_reason": "length"},
}  # fmt: skip


@pytest.fixture(scope="module")
def stock(make_tokenizer):
    """stock(name): the template over a tokenizer of its family."""
    made: dict[str, ChatTemplate] = {}

    def make(name: str) -> ChatTemplate:
        if name not in made:
            tokenizer = stock_tokenizer(name, make_tokenizer)
            made[name] = ChatTemplate(tokenizer, eos_token_ids=stop_ids(name, tokenizer))
        return made[name]

    return make


def pieces(template: ChatTemplate, row: dict) -> str:
    """The supervised pieces of a row, or why it is rejected."""
    try:
        samples = template.samples(parse_row(Row("data.jsonl:1", "row", row)))
    except Reject as reject:
        return f"REJECT {reject}"
    found = []
    for sample in samples:
        edges = np.flatnonzero(np.diff(np.r_[0, sample.loss_mask.numpy().astype(int), 0])).reshape(-1, 2)
        found += [template.tokenizer.decode(sample.input_ids[begin:end]) for begin, end in edges]
    return " | ".join(found)


@pytest.mark.parametrize(("name", "column"), [(name, column) for name, cells in EXPECTED.items() for column in cells])
def test_what_is_supervised(stock, name, column):
    """Once the first control token behind an answer was its end (LFM2, Cohere), GLM's answers had none, Qwen3.5's began
    with `</think>`, R1's and Nemotron's were refused, and arguments in a string were encoded twice."""
    wanted, found = EXPECTED[name][column], pieces(stock(name), ROWS[column])
    assert found.startswith(wanted) if wanted.startswith("REJECT") else found == wanted


def test_every_cell_is_filled():
    assert set(EXPECTED) == set(FAMILIES) and all(set(cells) == set(ROWS) for cells in EXPECTED.values())


def test_the_table_can_fail(make_tokenizer):
    """The negative control: a wrong stop token takes LFM2's end of turn away, and what was right is not found."""
    text = (FOLDERS[0] / "lfm2.jinja").read_text("utf-8")
    wrong = ChatTemplate(make_tokenizer(LFM.control, text, eos="<|tool_call_end|>"))
    assert pieces(wrong, ROWS["tools"]) != EXPECTED["lfm2"]["tools"]


@pytest.mark.parametrize("name", ["command_r7b", "lfm2", "gemma3", "llama3_1", "mistral_small", "qwen3"])
def test_the_tokenizers_eos_ends_turns_where_the_model_states_none(make_tokenizer, name):
    """It once was passed over when it also ends the user's turns, and <|END_RESPONSE|> was Cohere's end of turn."""
    family, text = FAMILIES[name], (FOLDERS[0] / f"{name}.jinja").read_text("utf-8")
    ends = {"gemma3": "<end_of_turn>", "llama3_1": "<|eot_id|>", "command_r7b": "<|END_OF_TURN_TOKEN|>",
            "mistral_small": "</s>"}  # fmt: skip
    tokenizer = make_tokenizer(family.control, text, eos=ends.get(name, "<|im_end|>"), words=family.words)
    if family.bos:
        tokenizer.bos_token = family.bos
    assert pieces(ChatTemplate(tokenizer), ROWS["system"]) == EXPECTED[name]["system"]
