"""A tiny Qwen3-VL or Qwen2.5-VL that learns to caption the drawn pictures: random weights, words, the real processor.

Knows pictures, captions and one model. Nothing is trained here that fledge trains: this makes a target to use it on.
Learning rate: at 3e-3, on half as many pictures, digits were guessed after 350 steps and three quarters right after
700; at 2e-3 they are right after 300 (dev/log, 2026-11-24).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from drawn_pictures import QUESTION, WORDS, Task, draw

from fledge.data.images import source_of_value
from fledge.data.samples import Prompt
from fledge.data.tokenize import ChatTemplate
from fledge.data.vision import Vision, image_only

CONTROL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PATCH = 8
FIRST_SEED = 100_000
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # classes, and what differs in rope and eyes
    "qwen3_vl": (
        "Qwen3VL", {"mrope_interleaved": True}, {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", {}, {"window_size": 32, "fullatt_block_indexes": [1, 2]}),
}  # fmt: skip


@dataclass(frozen=True)
class Schooling:
    """How long the target learns."""

    steps: int = 600
    batch: int = 32
    pictures: int = 8192
    learning_rate: float = 2e-3


def make_processor(task: Task, family: str = "qwen3_vl") -> Any:
    """A word tokenizer with the family's processor for pictures of one size."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vocab = {word: index for index, word in enumerate((*CONTROL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", chat_template=TEMPLATE
    )
    area = {"shortest_edge": task.size**2, "longest_edge": task.size**2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=1, size=area)
    processor_class = getattr(transformers, f"{FAMILIES[family][0]}Processor")
    return image_only(processor_class)(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)


def make_model(tokenizer: Any, family: str = "qwen3_vl") -> Any:
    """Seven layers, so that the default taps (2, 3, 4) are three; a head_dim that engines' kernels know."""
    import transformers

    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(list(CONTROL)), strict=True))
    name, rope, vision = FAMILIES[family]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 7,
        "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32, "max_position_embeddings": 256,
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], **rope},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={
            "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 96, **vision},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    return model


def prompt_for(template: ChatTemplate, image: Any) -> Prompt:
    """The question about a picture that lies in no file."""
    content = [{"type": "image", "image": source_of_value(image)}, {"type": "text", "text": QUESTION}]
    return template.prompt([{"role": "user", "content": content}])


def teach(model: Any, vision: Vision, task: Task, school: Schooling) -> None:
    """Cross-entropy of the captions. All sequences are equally long, so a batch is a stack."""
    drawn = [draw(seed, task) for seed in range(FIRST_SEED, FIRST_SEED + school.pictures)]
    prompt = prompt_for(ChatTemplate(vision.tokenizer, vision=vision), drawn[0][0])  # the same for every picture
    pictures = vision.processor.image_processor([image for image, _ in drawn], return_tensors="pt")
    pixels = pictures["pixel_values"].view(len(drawn), -1, pictures["pixel_values"].shape[-1])
    assert torch.equal(pixels[0], prompt.model_inputs["pixel_values"]), "read otherwise than in a prompt"
    answers = [vision.tokenizer(f"{caption} <|im_end|>", add_special_tokens=False)["input_ids"] for _, caption in drawn]
    ids = torch.tensor([prompt.ids + answer for answer in answers])
    begin, grid = len(prompt.ids), prompt.model_inputs["image_grid_thw"].expand(school.batch, -1)
    kinds = (ids[:1] == vision.image_token_id).long().expand(school.batch, -1)
    rows = torch.arange(begin - 1, ids.shape[1] - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=school.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    some, total = torch.empty(0, dtype=torch.long), 0.0
    model.train()
    for step in range(school.steps):
        if len(some) < school.batch:
            some = torch.randperm(len(ids), generator=order)
        batch, some = some[: school.batch], some[school.batch :]
        rate = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / school.steps)) + 0.01)
        optimizer.param_groups[0]["lr"] = school.learning_rate * rate
        logits = model(
            input_ids=ids[batch], pixel_values=pixels[batch].flatten(0, 1), image_grid_thw=grid,
            mm_token_type_ids=kinds, use_cache=False, logits_to_keep=rows,
        ).logits  # fmt: skip
        loss = F.cross_entropy(logits.flatten(0, 1), ids[batch, begin:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {total / 100:.3f}", flush=True)
            total = 0.0
    model.eval()
