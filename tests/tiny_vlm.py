"""The table of tiny vision-language targets: real architectures with random weights, real processors, no hub.

A new architecture is a new row here; the equivalence tests run over it. Images are a few dozen pixels, patches four.
"""

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from saved_target import byte_tokenizer
from transformers import AddedToken

from fledge.data.tokenize import ChatTemplate, Prompt
from fledge.data.vision import Vision, image_only
from fledge.target.model import Target

WINDOW = 7
TAPS = (1, 2, 3)
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
QWEN_VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 64, "initializer_range": 0.15,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16, "initializer_range": 0.15,
}  # fmt: skip
AREA = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Row:
    """One architecture: config, processor, and how its template marks a picture."""

    config: str
    processor: str
    image_processor: tuple[str, str, dict[str, Any]]  # transformers model, PIL class, arguments
    tokens: tuple[str, ...]  # control tokens of pictures
    mark: str  # what the chat template writes for a picture
    text: dict[str, Any]
    vision: dict[str, Any]
    other: Callable[[Any], dict[str, Any]]  # tokenizer -> fields of the whole config
    attributes: dict[str, str] | None = None  # names the processor expects of its tokenizer
    arguments: dict[str, Any] | None = None  # of the processor
    parts_only: bool = False  # the template walks over parts, as LLaVA's does


def _qwen(tokenizer: Any) -> dict[str, Any]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))


def _id(name: str, token: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda tokenizer: {name: tokenizer.convert_tokens_to_ids(token), **more}


QWEN_PROCESSOR = ("qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 4, "merge_size": 2, **AREA})
IDEFICS = (
    "idefics3",
    "Idefics3ImageProcessorPil",
    {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
)
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
                  *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)))  # fmt: skip
QWEN3_5: dict[str, Any] = {
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True}}  # fmt: skip
QWEN3_5_VISION = {**QWEN_VISION, "num_position_embeddings": 64}
VLMS: dict[str, Row] = {
    "qwen2_5_vl": Row(
        "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor", QWEN_PROCESSOR, QWEN_TOKENS, QWEN_MARK,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}, _qwen),
    "qwen3_vl": Row(
        "Qwen3VLConfig", "Qwen3VLProcessor", QWEN_PROCESSOR, QWEN_TOKENS, QWEN_MARK,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
                             "mrope_interleaved": True}},
        {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}, _qwen),
    "qwen3_vl_moe": Row(
        "Qwen3VLMoeConfig", "Qwen3VLProcessor", QWEN_PROCESSOR, QWEN_TOKENS, QWEN_MARK,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}, _qwen),
    "qwen3_5": Row(
        "Qwen3_5Config", "Qwen3VLProcessor", QWEN_PROCESSOR, QWEN_TOKENS, QWEN_MARK, QWEN3_5, QWEN3_5_VISION, _qwen),
    "qwen3_5_moe": Row(
        "Qwen3_5MoeConfig", "Qwen3VLProcessor", QWEN_PROCESSOR, QWEN_TOKENS, QWEN_MARK,
        {**QWEN3_5, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32}, QWEN3_5_VISION, _qwen),
    "hunyuan_vl": Row(
        "HunYuanVLConfig", "HunYuanVLProcessor",
        ("hunyuan_vl", "HunYuanVLImageProcessorPil", {"patch_size": 4, "merge_size": 2, **AREA}),
        ("<im_open>", "<image>", "<im_close>", "<pad>"), "<im_open><image><im_close>",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0,
                             "mrope_section": [2, 2, 2, 2]}},
        {**VIT, "spatial_merge_size": 2, "max_image_size": 64, "out_hidden_size": 64},
        lambda t: {**_id("image_token_id", "<image>")(t), **_id("im_start_id", "<im_open>")(t),
                   **_id("im_end_id", "<im_close>")(t)},
        {"image_token": "<image>", "image_start_token": "<im_open>", "image_end_token": "<im_close>",
         "pad_token": "<pad>"}),
    "llava": Row(
        "LlavaConfig", "LlavaProcessor",
        ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
        ("<image>",), "<image>", {"model_type": "llama"}, {"model_type": "clip_vision_model", **VIT},
        _id("image_token_index", "<image>", image_seq_length=16),
        None, {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, True),
    "gemma3": Row(
        "Gemma3Config", "Gemma3Processor", ("gemma3", "Gemma3ImageProcessorPil", {"size": {"height": 16, "width": 16}}),
        ("<boi>", "<eoi>", "<img>"), "<boi>",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 16,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
             "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"model_type": "siglip_vision_model", **VIT},
        lambda t: {**_id("image_token_index", "<img>")(t), **_id("boi_token_index", "<boi>")(t),
                   **_id("eoi_token_index", "<eoi>")(t), "mm_tokens_per_image": 4},
        {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}, {"image_seq_length": 4}),
    "internvl": Row(
        "InternVLConfig", "InternVLProcessor",
        ("got_ocr2", "GotOcr2ImageProcessorPil", {"size": {"height": 16, "width": 16}, "crop_to_patches": True,
                                                 "min_patches": 1, "max_patches": 4}),
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), "<IMG_CONTEXT>\n",
        {"model_type": "qwen2"}, {**VIT, "image_size": [16, 16], "patch_size": [4, 4]},
        _id("image_token_id", "<IMG_CONTEXT>", image_seq_length=4),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"}, {"image_seq_length": 4}),
    "idefics3": Row(
        "Idefics3Config", "Idefics3Processor", IDEFICS, IDEFICS_TOKENS, "<image>", {"model_type": "llama"}, VIT,
        _id("image_token_id", "<image>", scale_factor=2), None, {"image_seq_len": 4}, True),
    "smolvlm": Row(  # SmolVLM's own processor needs num2words; for pictures Idefics3's is the same
        "SmolVLMConfig", "Idefics3Processor", IDEFICS, IDEFICS_TOKENS, "<image>", {"model_type": "llama"}, VIT,
        _id("image_token_id", "<image>", scale_factor=2), None, {"image_seq_len": 4}, True),
}  # fmt: skip
NAMES = tuple(VLMS)
HYBRIDS = ("qwen3_5", "qwen3_5_moe")  # layers with a running state: chains only
MULTIMODAL_ROPE = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", *HYBRIDS, "hunyuan_vl")


def template_of(row: Row) -> str:
    """ChatML with the row's marks."""
    part = "{% if p.type == 'text' %}{{ p.text }}{% else %}" + row.mark + "{% endif %}"
    content = "{% for p in m.content %}" + part + "{% endfor %}"
    if not row.parts_only:
        content = "{% if m.content is string %}{{ m.content }}{% else %}" + content + "{% endif %}"
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tiny_processor(name: str, tokenizer: Any = None, **image_arguments: Any) -> Any:
    """The row's processor around a byte tokenizer that knows its control tokens."""
    import transformers

    row = VLMS[name]
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in row.tokens])
    tokenizer.chat_template = template_of(row)
    named = {key: value for key, value in (row.attributes or {}).items() if key != "pad_token"}
    if "pad_token" in (row.attributes or {}):
        tokenizer.pad_token = (row.attributes or {})["pad_token"]
    if named:
        tokenizer._set_model_specific_special_tokens(special_tokens=named)  # as `extra_special_tokens` of a checkpoint
    model, image_class, arguments = row.image_processor
    module = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
    image_processor = getattr(module, image_class)(**{**arguments, **image_arguments})
    known = getattr(transformers, row.processor)
    if "video_processor" in known.get_attributes():
        known = image_only(known)
    template = tokenizer.chat_template
    return known(image_processor=image_processor, tokenizer=tokenizer, chat_template=template, **(row.arguments or {}))


def tiny_vlm_model(name: str, tokenizer: Any, seed: int = 0, **overrides: Any) -> Any:
    """A fresh random model of the row, for this tokenizer."""
    import transformers

    row = VLMS[name]
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": eos, **row.text, **overrides}
    config = getattr(transformers, row.config)(
        text_config=text, vision_config=row.vision, tie_word_embeddings=False, **row.other(tokenizer)
    )
    config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        # zero at initialisation: would hide a dropped bias, or (Gemma 3's projection) the whole picture
        if parameter.ndim == 1 and "bias" in key or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = eos
    return model


@functools.cache
def tiny_vlm(name: str) -> Target:
    """The target of the row, made once."""
    vision = Vision(tiny_processor(name))
    return Target(tiny_vlm_model(name, vision.tokenizer), vision=vision, tap_layers=TAPS, name=f"tiny-{name}")


@functools.cache
def tiny_template(name: str) -> ChatTemplate:
    target = tiny_vlm(name)
    return ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids, vision=target.vision)


def picture(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    """Coloured noise: no two alike."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture_file(folder: Path, seed: int = 0, width: int = 40, height: int = 24) -> Path:
    """A picture as a PNG."""
    path = folder / f"picture-{seed}-{width}x{height}.png"
    if not path.is_file():
        picture(seed, width, height).save(path)
    return path


def image_prompt(name: str, folder: Path, *texts: str, seed: int = 0) -> Prompt:
    """A user's turn: a text, a picture, a text, a picture ... and the generation prompt."""
    content: list[dict[str, Any]] = []
    for index, text in enumerate(texts or ("look: ",)):
        sizes = ((40, 24), (20, 36))[index % 2]
        content += [{"type": "text", "text": text},
                    {"type": "image", "image": str(picture_file(folder, seed + index, *sizes))}]  # fmt: skip
    content.append({"type": "text", "text": "?"})
    return tiny_template(name).prompt([{"role": "user", "content": content}])


def save_vlm(folder: Path, name: str = "qwen2_5_vl", *, seed: int = 0, **overrides: Any) -> Path:
    """Model and processor, as `save_pretrained` leaves them."""
    processor = tiny_processor(name)
    tiny_vlm_model(name, processor.tokenizer, seed, **overrides).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_image_conversations(path: Path, count: int, *, text_only: Sequence[int] = (2,), prefix: str = "row") -> Path:
    """Conversations with a picture, with two, and text alone, in one file; pictures beside it, named relatively."""
    rows = []
    for index in range(count):
        files = [] if index in text_only else [picture_file(path.parent, index)]
        if index % 3 == 1 and files:
            files.append(picture_file(path.parent, 100 + index, 20, 36))
        content: Any = [{"type": "image", "image": file.name} for file in files]
        content.append({"type": "text", "text": f"what is number {index}?"})
        rows.append({"id": f"{prefix}-{index}", "messages": [
            {"role": "user", "content": content if files else content[-1]["text"]},
            {"role": "assistant", "content": f"it is picture {index} of {count}, I am sure"}]})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
