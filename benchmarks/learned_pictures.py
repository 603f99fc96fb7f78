"""A vision-language target that really looks at pictures, made in minutes on a CPU, and a head trained for it.

    python benchmarks/learned_pictures.py FOLDER [--steps 700] [--head-epochs 8] [--json FILE]

1. A tiny Qwen3-VL (random weights, a word tokenizer, the family's own processor) learns to caption drawn pictures.
2. It captions unseen pictures itself; `fledge train` trains a head on these answers, pictures included.
3. `fledge bench` measures the head on other pictures: tau, and outputs token for token.
4. The same questions over noise: the captions must change, and still be reproduced exactly.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from drawn_pictures import QUESTION, WORDS, draw, noise, write_rows

from fledge.bench.args import BenchArgs, DecodingArgs, ModelArgs, OutputArgs, PromptArgs, WorkerArgs
from fledge.bench.run import bench
from fledge.data.tokenize import ChatTemplate
from fledge.data.vision import Vision, image_only
from fledge.decoding.generate import Sampling, TreeShape, generate_plain, generate_speculative
from fledge.draft.checkpoint import load_draft
from fledge.target.model import Target
from fledge.train import run as training
from fledge.train.arguments import TrainArgs, parse_args

CONTROL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PATCH, STEPS = 8, 700
SEEN, ANSWERED, ASKED = range(100_000, 104_096), range(200_000, 200_512), range(300_000, 300_032)
TREE, CHAIN = TreeShape(24, 4, 4), TreeShape(6, 4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--head-epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = learn(options.folder, steps=options.steps, head_epochs=options.head_epochs)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def learn(folder: Path, *, steps: int, head_epochs: int) -> dict[str, Any]:
    """All four parts; every figure of the report."""
    clock = time.process_time()
    processor = make_processor()
    model = make_model(processor.tokenizer)
    losses = train_target(model, Vision(processor), steps)
    model.save_pretrained(folder / "target")
    processor.save_pretrained(folder / "target")
    target = Target.from_pretrained(str(folder / "target"), device="cpu")
    figures: dict[str, Any] = {"target_cpu_s": time.process_time() - clock, "target_loss": losses[-1]}
    questions = write_rows(folder, "asked", ASKED, with_answers=False)
    data = answered_by(target, write_rows(folder, "answered", ANSWERED, with_answers=True))

    clock = time.process_time()
    train_head(folder, data, head_epochs)
    figures["head_cpu_s"] = time.process_time() - clock
    figures |= measure(folder, questions) | compare_with_noise(folder)
    return figures


# -- the target --------------------------------------------------------------------------------------------------------


def make_processor() -> Any:
    """A word tokenizer with Qwen3-VL's processor for pictures of 64 x 64."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vocab = {word: index for index, word in enumerate((*CONTROL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", chat_template=TEMPLATE
    )
    area = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=1, size=area)
    return image_only(Qwen3VLProcessor)(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)


def make_model(tokenizer: Any) -> Any:
    """Seven layers, so that the default taps (2, 3, 4) are three."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(list(CONTROL)), strict=True))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 256,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"], "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4], "mrope_interleaved": True}},
        vision_config={
            "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 96, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1]},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    return model


def train_target(model: Any, vision: Vision, steps: int, batch: int = 32, peak: float = 3e-3) -> list[float]:
    """Cross-entropy of the captions. All sequences are equally long, so a batch is a stack."""
    template = ChatTemplate(vision.tokenizer, vision=vision)
    prompts, answers = [], []
    for seed in SEEN:
        image, caption = draw(seed)
        prompts.append(prompt_for(template, image))
        answers.append(vision.tokenizer(f"{caption} <|im_end|>", add_special_tokens=False)["input_ids"])
    pixels = torch.stack([prompt.model_inputs["pixel_values"] for prompt in prompts])
    ids = torch.tensor([prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True)])
    begin, grid = len(prompts[0].ids), prompts[0].model_inputs["image_grid_thw"]
    kinds = (ids[:1] == vision.image_token_id).long().expand(batch, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    chance, losses = torch.Generator().manual_seed(0), []
    model.train()
    for step in range(steps):
        rate = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        optimizer.param_groups[0]["lr"] = peak * rate
        some = torch.randint(len(ids), (batch,), generator=chance)
        logits = model(
            input_ids=ids[some], pixel_values=pixels[some].flatten(0, 1), image_grid_thw=grid.expand(batch, -1),
            mm_token_type_ids=kinds, use_cache=False, logits_to_keep=torch.arange(begin - 1, ids.shape[1] - 1),
        ).logits  # fmt: skip
        loss = F.cross_entropy(logits.flatten(0, 1), ids[some, begin:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    model.eval()
    return losses


# -- the head ----------------------------------------------------------------------------------------------------------


def prompt_for(template: ChatTemplate, image: Any) -> Any:
    """The question about a picture that lies in no file."""
    from fledge.data.images import source_of_value

    content = [{"type": "image", "image": source_of_value(image)}, {"type": "text", "text": QUESTION}]
    return template.prompt([{"role": "user", "content": content}])


def answered_by(target: Target, data: Path) -> Path:
    """The same rows with the target's own captions: what a head has to predict."""
    template = ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids, vision=target.vision)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row, seed in zip(rows, ANSWERED, strict=True):
        row["messages"][1]["content"] = caption_of(target, template, draw(seed)[0])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def caption_of(target: Target, template: ChatTemplate, image: Any) -> str:
    prompt = prompt_for(template, image)
    found = generate_plain(
        target, prompt.ids, max_new_tokens=40, sampling=Sampling(), model_inputs=prompt.model_inputs
    )  # fmt: skip
    return " ".join(target.tokenizer.convert_ids_to_tokens(found.token_ids, skip_special_tokens=True))


def train_head(folder: Path, data: Path, epochs: int) -> None:
    flags = [
        "--target_model_name_or_path", str(folder / "target"), "--train_data_path", str(data), "--output_dir",
        str(folder / "head"), "--num_train_epochs", str(epochs), "--per_device_train_batch_size", "8", "--ttt_steps",
        "5", "--draft_vocab_size", "0", "--learning_rate", "2e-3", "--bf16", "False", "--save_strategy", "no",
        "--use_cpu", "True", "--logging_steps", "100", "--save_dtype", "float32", "--disable_tqdm", "True",
    ]  # fmt: skip
    training.train(parse_args(TrainArgs, flags, prog="train", description=""))


# -- figures -----------------------------------------------------------------------------------------------------------


def measure(folder: Path, questions: Path) -> dict[str, Any]:
    """`fledge bench` over unseen pictures, greedy: a tree and a chain; and how many captions are right."""
    figures: dict[str, Any] = {}
    for name, tree in (("tree", TREE), ("chain", CHAIN)):
        out = folder / f"bench-{name}"
        bench(BenchArgs(
            model=ModelArgs(base_model_path=str(folder / "target"), eagle_model_path=str(folder / "head")),
            prompts=PromptArgs(bench_name=(str(questions),)),
            decoding=DecodingArgs(temperature=0.0, max_new_token=40, total_token=tree.total_token, depth=tree.depth,
                                  top_k=tree.top_k),
            workers=WorkerArgs(num_gpus_total=0), output=OutputArgs(output_dir=out, samples=1),
        ))  # fmt: skip
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if '"turns"' in line]
        turns = [row["turns"][0] for row in rows]
        rounds = [kept for turn in turns for kept in turn["eagle"]["accepted"]]
        figures[f"tau_{name}"] = 1 + sum(rounds) / len(rounds)
        figures[f"identical_{name}"] = sum(
            turn["baseline"]["token_ids"] == turn["eagle"]["token_ids"] for turn in turns
        )
    captions = {str(seed): draw(seed)[1] for seed in ASKED}
    figures["questions"] = len(rows)
    figures["right_captions"] = sum(
        captions[row["question_id"]].split() == row["turns"][0]["baseline"]["text"].split() for row in rows
    )
    return figures


def compare_with_noise(folder: Path) -> dict[str, Any]:
    """Noise instead of the picture: another caption, and still the plain one token for token."""
    head = folder / "head"
    target = Target.from_pretrained(str(folder / "target"), device="cpu")
    draft = load_draft(head, target.embedding_weight)
    template = ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids, vision=target.vision)
    changed = identical = 0
    for seed in ASKED:
        prompts = [prompt_for(template, image) for image in (draw(seed)[0], noise(seed))]
        plain = [
            generate_plain(target, p.ids, max_new_tokens=40, sampling=Sampling(), model_inputs=p.model_inputs).token_ids
            for p in prompts
        ]
        found = generate_speculative(
            target, draft, prompts[1].ids, tree=TREE, max_new_tokens=40, sampling=Sampling(),
            model_inputs=prompts[1].model_inputs,
        )  # fmt: skip
        changed += plain[0] != plain[1]
        identical += found.token_ids == plain[1]
    return {"changed_by_noise": changed, "identical_over_noise": identical}


if __name__ == "__main__":
    main()
