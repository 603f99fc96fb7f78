"""What a head that was trained on the target loses when the target is quantised behind it.

    python benchmarks/quantised_target.py --target TARGET --draft HEAD --bench-dir bench --out work

Every format rounds the weights of the decoder layers (not embedding, head and norms) as its engine would, and the
model computes with the rounded numbers. The formats of GGUF are rounded by the package `gguf`; fp8 is E4M3 with a scale
for each output channel. The answers are each model's own, greedy; tau is that of decoding them (replay.py), with its
standard error over the questions. "same" is the share of the target's tokens that the quantised model would have
chosen behind the same text. A format that changes nothing is the control: it must give the same tau.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from replay import Answer, Round, recorded, replay, tau
from torch import Tensor

from fledge import provenance
from fledge.bench.prompts import load_questions
from fledge.data.tokenize import ChatTemplate
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")
FORMATS = ("none", "Q8_0", "fp8", "Q5_0", "Q4_1", "Q4_0")
SHAPES = {"chain 3": TreeShape(4, 2, 1), "tree 8": TreeShape(8, 6, 4), "tree 60": TreeShape(60, 7, 10)}
RESAMPLES = 200


def main() -> None:
    args = parse_args()
    try:
        print(measured(args))
    except UserError as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="target folder, unquantised")
    parser.add_argument("--draft", required=True, help="head trained on it")
    parser.add_argument("--bench-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="answers and result")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tasks", nargs="+", default=list(SETS))
    parser.add_argument("--questions", type=int, default=20, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chat-template-type", help="as in `fledge bench`; for a base model, which has none")
    return parser.parse_args()


def measured(args: argparse.Namespace) -> str:
    """The table; result and answers are kept in --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    plain: list[Answer] = []
    for name in args.formats:
        files = read_drafter(args.draft)
        target = Target.from_pretrained(args.target, dtype=getattr(torch, args.dtype), tap_layers=files.tap_layers)
        changed = quantise(target, name)
        answers = own_answers(target, args, name)
        plain = plain or answers
        draft = files.bind(target)
        rows[name] = {"changed": changed, "same": agreement(target, plain)}
        for shape, tree in SHAPES.items():
            rounds = replay(draft, tree, answers)
            rows[name][shape] = {"tau": tau(rounds), "error": standard_error(rounds)}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    provenance.write_json(args.out / "quantised.json", {"draft": args.draft, "formats": rows, **conditions(args)})
    return table(rows)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    names = ("tasks", "questions", "max_new_tokens", "dtype")
    return {**{name: getattr(args, name) for name in names}, "torch": torch.__version__}


@torch.no_grad()
def quantise(target: Target, name: str) -> float:
    """Round the decoder layers' matrices in place. Returns the root mean square of the change, of the weights' own."""
    change = size = 0.0
    for weight in (module.weight for module in target.model.modules() if isinstance(module, torch.nn.Linear)):
        if weight.data_ptr() in {target.head_weight.data_ptr(), target.embedding_weight.data_ptr()}:
            continue
        new = rounded(weight.float(), name).to(weight.dtype)
        change += float((new.float() - weight.float()).square().sum())
        size += float(weight.float().square().sum())
        weight.copy_(new)
    return (change / size) ** 0.5


def rounded(weight: Tensor, name: str) -> Tensor:
    """(C, X) fp32 -> the numbers that the format can say."""
    if name == "none":
        return weight
    if name == "fp8":
        scale = weight.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(weight), kind), kind))


def own_answers(target: Target, args: argparse.Namespace, name: str) -> list[Answer]:
    template, found = ChatTemplate(target.tokenizer, args.chat_template_type, eos_token_ids=target.eos_token_ids), []
    for task in args.tasks:
        questions = load_questions(task, bench_dir=args.bench_dir, end=args.questions)
        prompts = [template.prompt_ids([{"role": "user", "content": one.turns[0]}]) for one in questions]
        kept = args.out / f"answers-{name}-{Path(task).stem}-{args.questions}-{args.max_new_tokens}.json"
        found += recorded(
            target, prompts, stops=template.stop_token_ids, most=args.max_new_tokens, temperature=0.0, kept=kept
        )
    return found


@torch.inference_mode()
def agreement(target: Target, answers: Sequence[Answer]) -> float:
    """The share of the answers' tokens that this target would have chosen."""
    same = total = 0
    for one in answers:
        states = target.forward(one.ids[None], taps=False).last_hidden[0, one.prompt_length - 1 : -1]
        same += int((target.head(states).argmax(-1) == one.ids[one.prompt_length :]).sum())
        total += one.tokens
    return same / total


def standard_error(rounds: Sequence[Sequence[Round]]) -> float:
    """Of tau, by drawing the questions again."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(rounds), (RESAMPLES, len(rounds)), generator=generator).tolist()
    return float(torch.tensor([tau([rounds[index] for index in draw]) for draw in draws]).std())


def table(rows: dict[str, dict[str, Any]]) -> str:
    head = "| format | weights changed by | same tokens | " + " | ".join(SHAPES) + " |"
    lines = [head, "|" + "---|" * (3 + len(SHAPES))]
    first = next(iter(rows.values()))
    for name, row in rows.items():
        cells = [
            f"{row[shape]['tau']:.2f} ± {row[shape]['error']:.2f} ({row[shape]['tau'] / first[shape]['tau']:.2f})"
            for shape in SHAPES
        ]
        lines.append(f"| {name} | {row['changed']:.1%} | {row['same']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
