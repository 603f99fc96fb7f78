"""Stock templates of public models (`data/chat_templates`, and the named ones), each over a tokenizer of its family.

The tokenizers have one token per byte and the control tokens of the family, so no merge hides a border.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import fledge

FOLDERS = (Path(__file__).parent / "data" / "chat_templates", Path(fledge.__file__).parent / "data" / "templates")


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


def stock_tokenizer(name: str, make_tokenizer: Callable[..., Any]) -> Any:
    """The tokenizer of a family, with this template as its own."""
    family = FAMILIES[name]
    path = next(folder / f"{name}.jinja" for folder in FOLDERS if (folder / f"{name}.jinja").is_file())
    tokenizer = make_tokenizer(family.control, path.read_text("utf-8"), eos=family.eos, words=family.words)
    if family.bos:
        tokenizer.bos_token = family.bos
    return tokenizer


def stop_ids(name: str, tokenizer: Any) -> list[int]:
    """What a model of the family stops at."""
    return tokenizer.convert_tokens_to_ids(list(FAMILIES[name].stops))


def save_target(name: str, make_tokenizer: Callable[..., Any], folder: Path) -> None:
    """All that the data stage needs of a target: tokenizer, template, and where the model stops."""
    tokenizer = stock_tokenizer(name, make_tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids(name, tokenizer)}))
