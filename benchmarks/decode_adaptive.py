"""`--adaptive` beside plain decoding and the fixed tree, with a head that helps and heads that do not.

    python benchmarks/decode_adaptive.py SMOLLM2_DIR HEAD --bench-dir QUESTIONS --out benchmarks/decode_adaptive_...

Three heads: the given one; an untrained one of its shape (random weights, unsure of everything); and the given one with
its vocabulary turned round (as sure of itself as before, and wrong). The costs of a round are measured first, as
`fledge bench --tune` does; each head keeps one budget over all prompts and rounds, as a server would.
Plain decoding is answered once for all heads in a turn. Greedy, no end of text; whole answers are timed, prompts
included. Prompts are taken in turns by all ways; the total over all prompts of a round counts. --clock cpu counts the
process's own seconds: on a machine that others use, with --threads 1, it is the steadier clock.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_peers import SETS, load_pair, name_of, prompts_of

from fledge import provenance
from fledge.bench.prompts import dataset_label
from fledge.data.samples import Prompt
from fledge.decoding.adaptive import AdaptiveBudget
from fledge.decoding.generate import generate
from fledge.decoding.records import Generation, Sampling
from fledge.decoding.tune import measure_costs
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 8

Ways = dict[str, Callable[[list[int], int], Generation]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="target folder")
    parser.add_argument("head", type=Path, help="head folder")
    parser.add_argument("--bench-dir", type=Path, help="folder of <set>/question.jsonl")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--prompts", type=int, default=16, help="in all, evenly from the sets")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tree", type=int, nargs=3, default=[8, 2, 3], metavar=("TOTAL_TOKEN", "DEPTH", "TOP_K"))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--fixed", action="store_true", help="also the fixed tree with the heads that do not help")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target, draft = load_pair(args.model, args.head, args.dtype)
    prompts, tree = prompts_of(target, args), TreeShape(*args.tree)
    costs = costs_of(target, draft, prompts[0], tree)
    heads = {name: HEADS[name](draft) for name in args.heads}
    ways: Ways = {"plain": lambda ids, n: generate(target, None, ids, **options(n))}
    for name, head in heads.items():
        if args.fixed or name == "given":
            ways[f"{name} head, fixed tree"] = speculative(target, head, tree, None)
        ways[f"{name} head, adaptive"] = speculative(target, head, tree, AdaptiveBudget(**costs))
    seconds, made = in_turns(ways, prompts, args)
    results = {way: summary(way, seconds, made) for way in ways}
    print(table(results))
    if args.out:
        write(args, tree, costs, results)


def in_turns(ways: Ways, prompts: list[list[int]], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds by way, round and prompt, and the last round's answers."""
    clock = CLOCKS[args.clock]
    for way, decode in ways.items():
        if "adaptive" not in way:  # what a budget learns belongs to the measurement
            decode(max(prompts, key=len), WARM_UP)
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    made: dict[str, list[Generation]] = {}
    names = list(ways)
    for _ in range(args.rounds):
        for way in names:
            seconds[way].append([])
            made[way] = []
        for turn, prompt in enumerate(prompts):
            first = turn % len(names)
            for way in names[first:] + names[:first]:
                start = clock()
                made[way].append(ways[way](prompt, args.new_tokens))
                seconds[way][-1].append(clock() - start)
    return seconds, made


# -- the ways ----------------------------------------------------------------------------------------------------------


def costs_of(target: Target, draft: DraftModel, prompt: list[int], tree: TreeShape) -> dict[str, Any]:
    """What `AdaptiveBudget` wants to know, measured as `--tune` measures it."""
    answer = generate(target, None, prompt, **options(32)).token_ids
    costs = measure_costs(target, draft, (Prompt(prompt), answer), [tree.top_k], options(32), lambda note: None)
    draft_s = {levels: seconds for (_, levels), seconds in costs.draft_s.items()}
    verify_s = {1: costs.plain_s, **costs.verify_s}
    return {"plain_s": costs.plain_s, "verify_s": verify_s, "draft_s": draft_s, "overhead_s": costs.overhead_s}


def speculative(
    target: Target, draft: DraftModel, tree: TreeShape, budget: AdaptiveBudget | None
) -> Callable[..., Generation]:
    return lambda ids, n: generate(target, draft, ids, tree=tree, budget=budget, **options(n))


def options(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "sampling": Sampling(), "eos_token_ids": ()}


def untrained(draft: DraftModel) -> DraftModel:
    """The head's shape with random weights."""
    generator = torch.Generator().manual_seed(0)
    made = copy.deepcopy(draft)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return made


def wrong(draft: DraftModel) -> DraftModel:
    """The head proposing, for every token it means, another one."""
    made = copy.deepcopy(draft)
    with torch.no_grad():
        made.lm_head.weight.copy_(draft.lm_head.weight.flip(0))
    return made


HEADS: dict[str, Callable[[DraftModel], DraftModel]] = {
    "given": lambda draft: draft,
    "untrained": untrained,
    "wrong": wrong,
}


# -- what came out -----------------------------------------------------------------------------------------------------


def summary(way: str, seconds: dict[str, list[list[float]]], made: dict[str, list[Generation]]) -> dict[str, Any]:
    """Totals, and the time over plain decoding's."""
    mine, plain = seconds[way], seconds["plain"]
    answers = made[way]
    totals = [sum(a) / sum(b) for a, b in zip(mine, plain, strict=True)]
    single = [a / b for each in zip(mine, plain, strict=True) for a, b in zip(*each, strict=True)]
    emitted = sum(len(one.token_ids) for one in answers)
    return {
        "tok_per_s": statistics.median(emitted / sum(each) for each in mine),
        "tau": (emitted - len(answers)) / sum(one.num_forwards for one in answers),
        "time_over_plain": {"median": statistics.median(totals), "rounds": totals, "least": min(single),
                            "most": max(single)},
        "same_tokens": sum(a.token_ids == b.token_ids for a, b in zip(answers, made["plain"], strict=True)),
        "prompts": len(answers), "seconds": mine,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    columns = "| way | tok/s, prompts included | tau | time over plain, by round | single prompts | tokens as plain |"
    lines = [columns, "|---|---|---|---|---|---|"]
    for way, row in results.items():
        over = row["time_over_plain"]
        rounds = ", ".join(f"{one:.3f}" for one in over["rounds"])
        lines.append(
            f"| {way} | {row['tok_per_s']:.1f} | {row['tau']:.2f} | {rounds} | {over['least']:.2f} to "
            f"{over['most']:.2f} | {row['same_tokens']}/{row['prompts']} |"
        )
    return "\n".join([*lines, ""])


def write(args: argparse.Namespace, tree: TreeShape, costs: dict[str, Any], results: dict[str, Any]) -> None:
    config = {key: str(value) for key, value in vars(args).items() if key != "bench_dir"}
    config |= {key: Path(config[key]).name for key in ("model", "head", "out")}
    config["sets"] = ", ".join(map(dataset_label, args.sets))
    command = f"python benchmarks/decode_adaptive.py {config['model']} {config['head']} --clock {args.clock}"
    provenance.write(args.out.with_suffix(".json"), config, command=command, costs_s=costs, results=results)
    head = [
        "# Adaptive drafting beside plain decoding and a fixed tree", "",
        f"{config['model']} in {args.dtype}, head {config['head']}, tree {name_of(tree)}, {args.prompts} prompts, "
        f"{args.new_tokens} new tokens, greedy, {args.threads} threads, {args.clock} time, {args.rounds} rounds in "
        "turns.", "",
    ]  # fmt: skip
    args.out.with_suffix(".md").write_text("\n".join(head) + table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
