"""A vision-language target that really looks at pictures, made in minutes on a CPU, and a head trained for it.

    python benchmarks/learned_pictures.py FOLDER [--json FILE]

1. A tiny Qwen3-VL (looking_target.py) learns to caption drawn pictures.
2. It captions unseen pictures itself; `fledge train` trains a head on these answers, pictures included.
3. `fledge bench` measures the head on other pictures: tau, and outputs token for token.
4. The same questions over noise: the captions must change, and still be reproduced exactly.

Captions are half fixed words, which any drafter gets: beside the head's tau stands that of the best drafter that sees
no picture, the most frequent next word after everything said so far.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from drawn_pictures import Task, draw, noise, write_rows
from looking_target import Schooling, make_model, make_processor, prompt_for, teach

from fledge import provenance
from fledge.bench.run import bench
from fledge.bench.settings import BenchSettings, ModelSettings, QuestionSettings, ReportSettings, WorkerSettings
from fledge.commands.train import TrainArgs, parse_args
from fledge.data.tokenize import ChatTemplate
from fledge.data.vision import Vision
from fledge.decoding.generate import Sampling, TreeShape, generate
from fledge.decoding.settings import SamplingSettings
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.target.model import Target
from fledge.train import run as training

FULL_TASK, FULL_SCHOOL = Task(), Schooling()
ANSWERED, ASKED = range(200_000, 200_512), range(300_000, 300_064)
HEAD_EPOCHS = 8
TREE, CHAIN = TreeShape(24, 4, 4), TreeShape(6, 4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = learn(options.folder)
    print(json.dumps(figures, indent=1))
    if options.json:
        provenance.write(options.json, figures=figures)


def learn(
    folder: Path, task: Task = FULL_TASK, school: Schooling = FULL_SCHOOL, *, answered: range = ANSWERED,
    asked: range = ASKED, head_epochs: int = HEAD_EPOCHS,
) -> dict[str, Any]:  # fmt: skip
    """All four parts; every figure of the report."""
    figures = make(folder, task, school, answered=answered, head_epochs=head_epochs)
    clock = time.process_time()
    questions = write_rows(folder, "asked", asked, task, with_answers=False)
    figures |= measure(folder, questions, asked, task) | compare_with_noise(folder, asked, task)
    known = captions_of(folder / "answered.jsonl")
    figures["tau_chain_of_the_blind"] = blind_tau(known, captions_of(questions), CHAIN.depth)
    figures["measuring_cpu_s"] = round(time.process_time() - clock, 1)
    return figures


def make(
    folder: Path, task: Task, school: Schooling, *, answered: range, head_epochs: int, family: str = "qwen3_vl"
) -> dict[str, Any]:  # fmt: skip
    """The first two parts: FOLDER/target and FOLDER/head."""
    figures: dict[str, Any] = {"pictures": school.pictures, "steps": school.steps}
    clock = time.process_time()
    processor = make_processor(task, family)
    model = make_model(processor.tokenizer, family)
    teach(model, Vision(processor), task, school)
    model.save_pretrained(folder / "target")
    processor.save_pretrained(folder / "target")
    figures["target_cpu_s"] = round(time.process_time() - clock, 1)

    clock = time.process_time()
    target = Target.from_pretrained(str(folder / "target"), device="cpu")
    data = write_rows(folder, "answered", answered, task, with_answers=True)
    figures |= answer(target, data, answered, task)
    figures["answers_cpu_s"] = round(time.process_time() - clock, 1)

    clock = time.process_time()
    train_head(folder, data, head_epochs)
    figures["head_cpu_s"] = round(time.process_time() - clock, 1)
    return figures


# -- the head ----------------------------------------------------------------------------------------------------------


def answer(target: Target, data: Path, seeds: range, task: Task) -> dict[str, int]:
    """Put the target's own captions into the rows: what a head has to predict. How many are right?"""
    template = ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids, vision=target.vision)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    right = of_another = 0
    before = ""
    for row, seed in zip(rows, seeds, strict=True):
        image, caption = draw(seed, task)
        prompt = prompt_for(template, image)
        found = generate(
            target, None, prompt.ids, max_new_tokens=40, sampling=Sampling(), model_inputs=prompt.model_inputs
        )
        said = " ".join(target.tokenizer.convert_ids_to_tokens(found.token_ids, skip_special_tokens=True))
        row["messages"][1]["content"] = said
        right += said == caption
        of_another += said == before
        before = caption
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"unseen_pictures": len(rows), "right_captions": right, "right_for_another_picture": of_another}


def train_head(folder: Path, data: Path, epochs: int) -> None:
    flags = [
        "--target", str(folder / "target"), "--data", str(data), "--output-dir",
        str(folder / "head"), "--num_train_epochs", str(epochs), "--per_device_train_batch_size", "8", "--ttt_steps",
        "5", "--draft_vocab_size", "0", "--learning_rate", "2e-3", "--bf16", "False", "--save_strategy", "no",
        "--use_cpu", "True", "--depth_survival", "1", "--position_weights", "fixed", "--logging_steps", "100",
        "--save_dtype", "float32", "--disable_tqdm", "True",
    ]  # fmt: skip
    training.train(parse_args(TrainArgs, flags, prog="train", description=""))


# -- figures -----------------------------------------------------------------------------------------------------------


def measure(folder: Path, questions: Path, seeds: range, task: Task) -> dict[str, Any]:
    """`fledge bench` over unseen pictures, greedy: a tree and a chain; and how many captions are right."""
    figures: dict[str, Any] = {"questions": len(seeds)}
    for name, tree in (("tree", TREE), ("chain", CHAIN)):
        out = folder / f"bench-{name}"
        bench(BenchSettings(
            model=ModelSettings(target=str(folder / "target"), draft=str(folder / "head"), total_token=tree.total_token,
                                depth=tree.depth, top_k=tree.top_k),
            prompts=QuestionSettings(bench_name=(str(questions),)),
            sampling=SamplingSettings(temperature=0.0, max_new_tokens=40),
            workers=WorkerSettings(num_gpus_total=0), output=ReportSettings(output_dir=out, samples=1),
        ))  # fmt: skip
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if '"turns"' in line]
        turns = [row["turns"][0] for row in rows]
        rounds = [kept for turn in turns for kept in turn["eagle"]["accepted"]]
        figures[f"tau_{name}"] = round(1 + sum(rounds) / len(rounds), 3)
        figures[f"identical_{name}"] = sum(
            turn["baseline"]["token_ids"] == turn["eagle"]["token_ids"] for turn in turns
        )
    captions = {str(seed): draw(seed, task)[1] for seed in seeds}
    figures["right_answers"] = sum(
        captions[str(row["question_id"])].split() == row["turns"][0]["baseline"]["text"].split() for row in rows
    )
    return figures


def compare_with_noise(folder: Path, seeds: range, task: Task) -> dict[str, Any]:
    """Noise instead of the picture: another caption, and still the plain one token for token."""
    target = Target.from_pretrained(str(folder / "target"), device="cpu")
    draft = load_draft(folder / "head", target.embedding_weight)
    template = ChatTemplate(target.tokenizer, eos_token_ids=target.eos_token_ids, vision=target.vision)
    changed = identical = 0
    for seed in seeds:
        prompts = [prompt_for(template, image) for image in (draw(seed, task)[0], noise(seed, task))]
        plain = [
            generate(target, None, p.ids, max_new_tokens=40, sampling=Sampling(), model_inputs=p.model_inputs).token_ids
            for p in prompts
        ]
        found = generate(
            target, draft, prompts[1].ids, tree=TREE, max_new_tokens=40, sampling=Sampling(),
            model_inputs=prompts[1].model_inputs,
        )  # fmt: skip
        changed += plain[0] != plain[1]
        identical += found.token_ids == plain[1]
    return {"changed_by_noise": changed, "identical_over_noise": identical}


def captions_of(rows: Path) -> list[list[str]]:
    """The words of every answer or reference, the end of the turn included."""
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        caption = row["messages"][1]["content"] if "messages" in row else row["reference"][0]
        found.append([*caption.split(), "<|im_end|>"])
    return found


def blind_tau(known: list[list[str]], asked: list[list[str]], depth: int) -> float:
    """tau of a chain that drafts the most frequent next word after the longest ending it knows, and sees nothing."""
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for words in known:
        for place, word in enumerate(words):
            for begin in range(place + 1):
                counts[tuple(words[begin:place])][word] += 1

    def following(words: list[str]) -> str:
        ending = next(tuple(words[begin:]) for begin in range(len(words) + 1) if tuple(words[begin:]) in counts)
        return counts[ending].most_common(1)[0][0]

    tokens = rounds = 0
    for words in asked:
        place = 1  # the first word is the prefill's
        while place < len(words):
            kept = 0
            while (
                kept < depth and place + kept < len(words) and following(words[: place + kept]) == words[place + kept]
            ):
                kept += 1
            place, tokens, rounds = place + kept + 1, tokens + kept + 1, rounds + 1
    return round(tokens / rounds, 3)


if __name__ == "__main__":
    main()
