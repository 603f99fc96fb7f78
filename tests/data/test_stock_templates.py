"""What is supervised under the stock templates of public models, piece by piece, as their targets would have written it.

Every expectation is written by hand from the model's documented format: the words, the control tokens among them and the
token at which the model stops. The tokenizer is one token per byte plus the control tokens of the family, so no merge
hides a border. `|` separates the supervised pieces of a conversation, those of samples of their own at the end.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fledge.data.conversations import parse_row
from fledge.data.rejects import Reject
from fledge.data.rows import Row
from fledge.data.tokenize import ChatTemplate

TEMPLATES = Path(__file__).parent / "chat_templates"


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
