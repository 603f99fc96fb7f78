"""Which recipe makes the better head? Several recipes and seeds on the same stored states, tau by decoding.

    fledge extract --target SMOLLM2_DIR --data train.jsonl --output-dir states
    python benchmarks/ablation.py --model SMOLLM2_DIR --states states --steps 1000 --seeds 0 1 2 --out work

Every run sees the same records in the same order for its seed, the same number of steps and learning rate, and the
same evaluation: greedy chains of four on the first questions of mt_bench, humaneval, gsm8k and alpaca (first turns;
FLEDGE_BENCH_DIR or --bench-dir has them; they are never trained on). Finished runs are kept and not repeated. Recipes:

    ours        what `fledge train` does by default: dynamic position weights, TTT to depths drawn at random
    fixed, full, shallow, lk, token, adamw, eagle3.1, rank    ours with one thing changed: position weights 0.8 ** k;
                full depth; --depth_survival 0.6; the LK-hybrid; one mean over all tokens; AdamW for everything; an
                EAGLE-3.1 head; lm_head as factors of rank 128
    full-fixed  to full depth with weights 0.8 ** k, as the next two
    common      what most public trainers do: the loss mask not shifted (the first drafted token of an answer is never
                trained, one position past its end is), KL, 0.8 ** k, sum over rows divided by batch * longest sequence,
                weights started at random but for lm_head, AdamW for everything
    common-loss the same loss and optimizer from our start: tells the start's share from the loss's
"""

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from replay import Answer, columns, recorded, replay, tau

from fledge import provenance
from fledge.bench.prompts import load_questions
from fledge.commands.train import TrainArgs, parse_args
from fledge.data.tokenize import ChatTemplate
from fledge.drafters.batch import Batch
from fledge.drafters.depth import RandomDepth
from fledge.drafters.eagle3 import ttt
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.loss import Teacher
from fledge.drafters.sequence_share import Share
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target
from fledge.train import module, run
from fledge.train.trainer import DraftTrainer

CHAIN = TreeShape(5, 3, 1)
TASKS = ("mt_bench", "humaneval", "gsm8k", "alpaca")
FULL, FIXED = ("--depth_survival", "1"), ("--position_weights", "fixed")
COMMON = (*FULL, *FIXED, "--loss_average", "token", "--matrix_optim", "same")
FLAGS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "fixed": FIXED,
    "full": FULL,
    "shallow": ("--depth_survival", "0.6"),
    "token": ("--loss_average", "token"),
    "adamw": ("--matrix_optim", "same"),
    "eagle3.1": ("--draft_type", "eagle3.1"),
    "full-fixed": (*FULL, *FIXED),
    "common": COMMON,
    "common-loss": COMMON,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="target folder, for the evaluation")
    parser.add_argument("--states", required=True, help="hidden states made by `fledge extract`")
    parser.add_argument("--recipes", nargs="+", choices=FLAGS, default=["ours", "common"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--ttt-steps", type=int, default=4)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bench-dir", type=Path, default=None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="named sets or question files")
    parser.add_argument("--questions", type=int, default=10, help="of each task")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; finished heads are only judged")
    parser.add_argument("--out", type=Path, required=True, help="folder of the heads and results")
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {}
    for seed in args.seeds:  # seeds outside: an early stop leaves whole comparisons
        for recipe in args.recipes:
            results.setdefault(recipe, {})[seed] = one_run(recipe, seed, args)
            print(table(results), flush=True)
    config = {**{key: str(value) for key, value in vars(args).items()}, "model": Path(args.model).name}
    config |= {"states": Path(args.states).name, "out": args.out.name, "bench_dir": None}
    name = f"ablation{drawn_at(args.temperature)}"
    provenance.write(args.out / f"{name}.json", config, command="python benchmarks/ablation.py", results=results)
    (args.out / f"{name}.md").write_text(table(results), encoding="utf-8")


def one_run(recipe: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and evaluate, or read what an earlier call found."""
    folder = args.out / f"{recipe}-{seed}"
    kept = folder / f"tau{drawn_at(args.temperature)}.json"
    if not kept.is_file():
        if not (folder / "model.safetensors").is_file():
            train(recipe, seed, folder, args)
        provenance.write_json(kept, evaluate(folder, args))
    return json.loads(kept.read_text(encoding="utf-8"))


def drawn_at(temperature: float) -> str:
    """Part of the names of what sampled answers give."""
    return f"-t{temperature:g}" if temperature else ""


def train(recipe: str, seed: int, folder: Path, args: argparse.Namespace) -> None:
    """`fledge train` with the recipe's flags, its parts exchanged for `common`."""
    words: list[Any] = [
        "--states", args.states, "--output-dir", folder, "--max_steps", args.steps, "--seed", seed,
        "--ttt_steps", args.ttt_steps, "--draft_vocab_size", args.draft_vocab_size, "--learning_rate",
        args.learning_rate, "--save_strategy", "steps", "--save_steps", 200, "--save_total_limit", 1,
        "--logging_steps", 50, "--per_device_train_batch_size", args.batch_size, "--disable_tqdm", True, *FLAGS[recipe],
    ]  # fmt: skip
    if args.max_samples:
        words += ["--max_samples", args.max_samples]
    parsed = parse_args(TrainArgs, [str(word) for word in words], prog="ablation", description="")
    with Exchanged(common=recipe.startswith("common"), random_start=recipe == "common"):
        run.train(parsed)


class Exchanged:
    """Within it, `fledge train` has the common recipe's alignment, average and start."""

    def __init__(self, *, common: bool, random_start: bool) -> None:
        self.common, self.random_start = common, random_start

    def __enter__(self) -> None:
        self.before = (
            module.align, module.Teacher, DraftTrainer._get_num_items_in_batch, DraftModel.warm_start
        )  # fmt: skip
        if self.common:
            module.align, module.Teacher = unshifted_align, whole_teacher  # type: ignore
            DraftTrainer._get_num_items_in_batch = rows_of_padded_batches  # type: ignore[method-assign]
        if self.random_start:
            DraftModel.warm_start = head_only  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        (
            module.align, module.Teacher, DraftTrainer._get_num_items_in_batch, DraftModel.warm_start  # type: ignore
        ) = self.before  # fmt: skip


def unshifted_align(
    batch: Batch, ttt_steps: int, depth: RandomDepth | None = None, share: Share | None = None
) -> ttt.Alignment:
    """Row t is trained at step k where l_{t+k}, whatever token it predicts.

    In `align` position p = t + 1 + k teaches where l_p and l_{p+1}; here it is to teach where l_{p-1}. A span [a, b) of
    l therefore becomes [a + 1, b + 2), cut at the document's end (whose last position teaches nothing in either).

        x  p p p a a a p p     l  0 0 0 1 1 1 0 0     given to align  0 0 0 0 1 1 1 1     teaching p  4 5 6
    """
    masks = []
    for mask in batch.loss_mask.split(list(batch.lengths)):
        one, two = mask.roll(1), mask.roll(2)
        one[:1], two[:2] = False, False
        masks.append(one | two)
    return ttt.align(dataclasses.replace(batch, loss_mask=torch.cat(masks)), ttt_steps, depth, share)


def whole_teacher(**known: Any) -> Teacher:
    """Stores summarise the target where the assistant wrote; the unshifted mask asks beyond."""
    return Teacher(**{**known, "summary": None})


def rows_of_padded_batches(trainer: Any, batch_samples: list, device: torch.device) -> torch.Tensor:
    """batch * longest sequence, supervised or not: what a mean over padded rows divides by."""
    rows = sum(len(batch) * max(len(item.input_ids) for item in batch) for batch in batch_samples)
    return torch.tensor(float(rows), device=device)


def head_only(draft: DraftModel, target_head: torch.Tensor, _taps: torch.Tensor) -> None:
    """The library's random start for everything, the target's rows for lm_head."""
    draft.warm_start_head(target_head)


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tau of each task, pooled over its questions, and their mean: the target answers once, and the rounds of a head
    are counted in its answers (`replay.py`)."""
    found = {}
    for task in args.tasks:
        target, known = answers(args.model, task, args.bench_dir, args.questions, args.max_new_tokens, args.temperature,
                                args.out)  # fmt: skip
        draft = load_draft(folder, target.embedding_weight)
        found[Path(task).stem] = tau(replay(draft, CHAIN, columns(known, target.tap_layers, draft.tap_layers)))
    return {**found, "mean": statistics.mean(found.values())}


@functools.cache
def target_of(model: str) -> tuple[Target, ChatTemplate]:
    return Target.from_pretrained(model), ChatTemplate.from_pretrained(model)


@functools.cache
def answers(
    model: str, task: str, bench_dir: Path | None, end: int, most: int, temperature: float, kept: Path
) -> tuple[Target, list[Answer]]:
    """The target, and its answers to a task's questions with their states; the tokens are kept in --out."""
    target, template = target_of(model)
    kept.mkdir(parents=True, exist_ok=True)
    questions = load_questions(task, bench_dir=bench_dir, end=end)
    prompts = [template.prompt_ids([{"role": "user", "content": question.turns[0]}]) for question in questions]
    file = kept / f"answers-{Path(task).stem}-{end}-{most}{drawn_at(temperature)}.json"
    stops = target.eos_token_ids
    return target, recorded(target, prompts, stops=stops, most=most, temperature=temperature, kept=file)


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Mean and spread over seeds by recipe and task."""
    tasks = list(next(iter(next(iter(results.values())).values())))
    lines = [
        "# Recipes, tau by decoding",
        "",
        f"| recipe | seeds | {' | '.join(tasks)} |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for recipe, seeds in results.items():
        cells = []
        for task in tasks:
            values = [row[task] for row in seeds.values()]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {recipe} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
