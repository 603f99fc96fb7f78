"""What is supervised under the stock templates of public models, as their targets would have written it.

The expectations (`chat_templates/expected.yaml`) follow the models' documented formats, not our code: the words, the
control tokens among them, and the token at which the model stops. The tokenizer has one token per byte and the control
tokens of the family, so no merge hides a border. Turns that become samples of their own come last.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

import fledge
from fledge.data.conversations import parse_row
from fledge.data.rejects import Reject
from fledge.data.rows import Row
from fledge.data.tokenize import ChatTemplate

FOLDERS = (Path(__file__).parent / "chat_templates", Path(fledge.__file__).parent / "data" / "templates")


@dataclass(frozen=True)
class Family:
    """The control tokens of a family, and the ids of which its generation config says that the model stops there."""

    control: tuple[str, ...]
    stops: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    words: tuple[str, ...] = ()  # tokens of their own that are no special tokens


CHATML = Family(("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ("<|im_end|>", "<|endoftext|>"),
                words=("<think>", "</think>", "<tool_call>", "</tool_call>"))  # fmt: skip
LLAMA3 = Family(
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), bos="<|begin_of_text|>",
)  # fmt: skip
LLAMA4 = Family(
    ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>",
     "<|python_end|>", "<|end_of_text|>"),
    ("<|end_of_text|>", "<|eom|>", "<|eot|>"), bos="<|begin_of_text|>",
)  # fmt: skip
HARMONY = Family(
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"),
    ("<|return|>", "<|endoftext|>", "<|call|>"),
)  # fmt: skip
GEMMA = Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"), bos="<bos>")
GEMMA4 = Family(
    ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
     "<|tool_response>", "<tool_response|>", "<|think|>"),
    ("<eos>", "<turn|>", "<|tool_response>"), bos="<bos>",
)  # fmt: skip
GLM = Family(
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|user|>", "<|observation|>"), words=("<think>", "</think>", "<tool_call>", "</tool_call>"),
)  # fmt: skip
DEEPSEEK = Family(
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", words=("<think>", "</think>", "<｜tool▁call▁end｜>"),
)  # fmt: skip
MISTRAL = Family(
    ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
     "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ("</s>",), bos="<s>", eos="</s>",
)  # fmt: skip
HUNYUAN = Family(
    ("<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_place▁holder▁no▁2｜>",
     "<｜hy_place▁holder▁no▁3｜>"),
    ("<｜hy_place▁holder▁no▁2｜>",),
)  # fmt: skip
HUNYUAN_MOE = Family(("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>"), ("<|eos|>",))
PHI3 = Family(
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>",
)  # fmt: skip
PHI4 = Family(("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|im_end|>"))
GRANITE = Family(
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"), ("<|end_of_text|>",)
)  # fmt: skip
LFM = Family(
    ("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
     "<|tool_response_start|>", "<|tool_response_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    ("<|im_end|>",), bos="<|startoftext|>",
)  # fmt: skip
COHERE = Family(
    ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
     "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>",
     "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
    ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>",
)  # fmt: skip
MINIMAX = Family(("]~!b[", "]~b]", "[e~["), ("[e~[",), words=("<think>", "</think>"))

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "w", "parameters": CITY}}]
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
FAMILIES = {
    "qwen2_5": CHATML, "qwen3": CHATML, "qwen3_instruct_2507": CHATML, "qwen3_thinking_2507": CHATML,
    "qwen3_5": CHATML, "qwen3_8": CHATML, "llama3_1": LLAMA3, "llama4": LLAMA4, "gpt_oss": HARMONY, "gemma2": GEMMA,
    "gemma3": GEMMA, "gemma4": GEMMA4, "gemma4_large": GEMMA4, "glm4_5": GLM, "deepseek": DEEPSEEK,
    "deepseek_v3_1": DEEPSEEK, "deepseek_r1": DEEPSEEK, "deepseek_r1_distill": DEEPSEEK, "mistral_v1": MISTRAL,
    "mistral_v3_tekken": MISTRAL, "mistral_small": MISTRAL, "hunyuan_dense": HUNYUAN, "hunyuan_moe": HUNYUAN_MOE,
    "phi3": PHI3, "phi4": PHI4, "phi4_mini": PHI3, "phi4_reasoning": PHI4, "granite3": GRANITE, "granite4": GRANITE,
    "lfm2": LFM, "command_r7b": COHERE, "minimax_m2": MINIMAX, "smollm3": CHATML, "nemotron3_nano": CHATML,
}  # fmt: skip
EXPECTED: dict[str, dict[str, str]] = yaml.safe_load((FOLDERS[0] / "expected.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def stock(make_tokenizer):
    """stock(name): the template over a tokenizer of its family."""
    made: dict[str, ChatTemplate] = {}

    def make(name: str) -> ChatTemplate:
        if name not in made:
            family = FAMILIES[name]
            path = next(folder / f"{name}.jinja" for folder in FOLDERS if (folder / f"{name}.jinja").is_file())
            tokenizer = make_tokenizer(family.control, path.read_text("utf-8"), eos=family.eos, words=family.words)
            if family.bos:
                tokenizer.bos_token = family.bos
            made[name] = ChatTemplate(tokenizer, eos_token_ids=tokenizer.convert_tokens_to_ids(list(family.stops)))
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
