"""Named chat templates (CHAT_TEMPLATE_TYPE): written here from the public formats, they override a tokenizer's own.

A name is a choice, never a guess: an unknown one is an error, and so is a template whose control tokens this tokenizer
would take apart into ordinary text, because a head trained on such text looks fine and is worthless.
A family may have several formats (Hunyuan: dense and MoE); the one whose control tokens the tokenizer knows is taken.
"""

from importlib.resources import files
from typing import Any

from fledge.errors import UserError, nearest

CHATML = ("<|im_start|>", "<|im_end|>")
QWEN_VL = (*CHATML, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")

TEMPLATES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {  # name -> (file, its control tokens), by preference
    "chatml": (("chatml", CHATML),),
    "qwen2": (("qwen2", CHATML),),
    "qwen3": (("qwen3", (*CHATML, "<think>", "</think>")),),
    "qwen2_5_vl": (("qwen2_5_vl", QWEN_VL),),
    "qwen3_vl": (("qwen3_vl", QWEN_VL),),
    "smollm2": (("smollm2", CHATML),),
    "hunyuan": (
        (
            "hunyuan_dense",
            ("<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_place▁holder▁no▁2｜>"),
        ),
        ("hunyuan_moe", ("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>")),
    ),
    "llama3": (("llama3", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),),
    "gemma": (("gemma", ("<bos>", "<start_of_turn>", "<end_of_turn>")),),
    "gpt_oss": (("gpt_oss", HARMONY),),
    "deepseek": (("deepseek", ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),),
    "mistral": (("mistral", ("<s>", "[INST]", "[/INST]", "</s>")),),
    "plain": (("plain", ()),),
}
ALIASES = {
    "qwen": "qwen2", "qwen2_5": "qwen2", "qwen2.5": "qwen2", "llama": "llama3", "llama_3": "llama3", "gemma2": "gemma",
    "gemma3": "gemma", "harmony": "gpt_oss", "gptoss": "gpt_oss", "deepseek_v3": "deepseek", "hunyuan_v1": "hunyuan",
    "hunyuan_7b": "hunyuan", "hunyuan_dense": "hunyuan", "hunyuan_moe": "hunyuan",
    "qwen2_vl": "qwen2_5_vl", "qwen2.5_vl": "qwen2_5_vl", "qwen2_audio": "qwen2", "hunyuan_vl": "own",
}  # fmt: skip
OWN = "own"  # the tokenizer's or processor's


def template_name(name: str | None) -> str:
    """A name in its one spelling; empty is the tokenizer's own template, an unknown name an error."""
    key = (name or OWN).lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key != OWN and key not in TEMPLATES:
        raise UserError(
            f"chat template {name!r} is unknown{nearest(key, TEMPLATES)}. Known: {', '.join(TEMPLATES)}; "
            f"leave it empty for the tokenizer's own template."
        )
    return key


def read_template(name: str, tokenizer: Any) -> str:
    """The text of a named template that fits this tokenizer."""
    missing: list[str] = []
    for file, control in TEMPLATES[template_name(name)]:
        missing = [token for token in control if not is_one_token(tokenizer, token)]
        if not missing:
            return (files("fledge.data") / "templates" / f"{file}.jinja").read_text(encoding="utf-8")
    raise UserError(
        f"chat template {name!r} does not fit this tokenizer: {', '.join(map(repr, missing))} "
        f"{'is' if len(missing) == 1 else 'are'} no control token of its vocabulary, so the text would be taken apart. "
        f"Use the template of this model's family, or leave --chat-template-type empty for the tokenizer's own."
    )


def fitting_template(tokenizer: Any) -> str:
    """The name of a template for a tokenizer that brings none: the first whose control tokens it has."""
    return next(
        name for name, choices in TEMPLATES.items()
        if any(all(is_one_token(tokenizer, token) for token in control) for _, control in choices)
    )  # fmt: skip


def is_one_token(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer turns this text into a single token that means it."""
    return len(ids := tokenizer.encode(text, add_special_tokens=False)) == 1 and tokenizer.decode(ids) == text
