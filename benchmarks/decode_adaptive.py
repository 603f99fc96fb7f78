"""The engine's own choice beside plain decoding and a fixed tree, with a head that helps and heads that do not.

    python benchmarks/decode_adaptive.py SMOLLM2_DIR HEAD --bench-dir QUESTIONS --out benchmarks/decode_adaptive_...

Three heads: the given one; an untrained one of its shape (random weights, unsure of everything); and the given one with
its vocabulary turned round (as sure of itself as before, and wrong). Each with what the text repeats (prompt lookup),
as the engine chooses, and alone; and prompt lookup without a head. Each keeps one budget over all prompts and rounds,
as a server would.
Plain decoding is answered once for all heads in a turn. No end of text; whole answers are timed, prompts
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
from unittest import mock

import torch
from decode_peers import SETS, load_pair, name_of, prompts_of

from fledge import provenance
from fledge.bench.prompts import dataset_label
from fledge.decoding.default_tree import default_tree
from fledge.decoding.generate import generate
from fledge.decoding.records import Generation, Sampling
from fledge.drafters.base import Drafter
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 8

Way = Callable[[list[int], int], Generation]
Ways = dict[str, Way]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="target folder")
    parser.add_argument("head", type=Path, help="head folder")
    parser.add_argument("--bench-dir", type=Path, help="folder of <set>/question.jsonl")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--prompts", type=int, default=16, help="in all, evenly from the sets")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=0.0)
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
    law = Sampling(args.temperature, seed=1)
    ways: Ways = {
        "plain": lambda ids, n: generate(target, None, ids, **options(law, n)),
        "no head": chosen(target, PromptLookup(), law),
    }
    for name in args.heads:
        head = HEADS[name](draft)
        if args.fixed or name == "given":
            ways[f"{name} head, fixed tree"] = speculative(target, head, tree, None, law)
        ways[f"{name} head"] = chosen(target, head, law)
        ways[f"{name} head alone"] = alone(chosen(target, copy.copy(head), law))
    seconds, made = in_turns(ways, prompts, args)
    results = {way: summary(way, seconds, made) for way in ways}
    print(table(results))
    if args.out:
        write(args, tree, results)


def in_turns(ways: Ways, prompts: list[list[int]], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds by way, round and prompt, and the last round's answers."""
    clock = CLOCKS[args.clock]
    for way, decode in ways.items():
        if way == "plain" or "fixed" in way:  # what a budget learns belongs to the measurement
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


def chosen(target: Target, drafter: Drafter, law: Sampling) -> Way:
    """The engine's own choice."""
    return speculative(target, drafter, *default_tree(target, drafter), law)


def alone(way: Way) -> Way:
    """Without what the text repeats."""

    def decode(ids: list[int], new_tokens: int) -> Generation:
        with mock.patch("fledge.decoding.session.free_proposer", lambda *_: None):
            return way(ids, new_tokens)

    return decode


def speculative(target: Target, drafter: Drafter, tree: TreeShape, budget: Any, law: Sampling) -> Way:
    return lambda ids, n: generate(target, drafter, ids, tree=tree, budget=budget, **options(law, n))


def options(law: Sampling, new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "sampling": law, "eos_token_ids": ()}


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


def write(args: argparse.Namespace, tree: TreeShape, results: dict[str, Any]) -> None:
    config = {key: str(value) for key, value in vars(args).items() if key != "bench_dir"}
    config |= {key: Path(config[key]).name for key in ("model", "head", "out")}
    config["sets"] = ", ".join(map(dataset_label, args.sets))
    command = f"python benchmarks/decode_adaptive.py {config['model']} {config['head']} --clock {args.clock}"
    provenance.write(args.out.with_suffix(".json"), config, command=command, results=results)
    head = [
        "# The engine's own choice beside plain decoding and a fixed tree", "",
        f"{config['model']} in {args.dtype}, head {config['head']}, tree {name_of(tree)}, {args.prompts} prompts, "
        f"{args.new_tokens} new tokens, T = {args.temperature:g}, {args.threads} threads, {args.clock} time, "
        f"{args.rounds} rounds in turns.", "",
    ]  # fmt: skip
    args.out.with_suffix(".md").write_text("\n".join(head) + table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
