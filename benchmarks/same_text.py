"""Is the text the same with a head as without, token for token: trees, chains and batches, greedy and drawn.

    python benchmarks/same_text.py MODEL HEAD QUESTIONS --log FILE [--per-set 25] [--no-exact] [--dtype bfloat16]

QUESTIONS is a folder of question sets (SET/question.jsonl, EAGLE's format). The sets take turns, and an answer is a
line of FILE: run again, the questions there are skipped. A question of two turns has two answers, the second behind
plain decoding's first. Answers of four questions at once are compared with those of each alone. --no-exact leaves the
order of sums to the library. Says for every way to decode how many answers are plain decoding's, and its seconds beside
plain decoding's. The seconds are the process's own: with --threads 1 they hold on a machine that others use.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fledge.decoding.exact import is_exact, want_exact
from fledge.decoding.generate import Sampling, TreeShape, generate, generate_batch
from fledge.drafters.registry import read_drafter
from fledge.target.model import Target

SHAPES = {"tree 60/7/10": TreeShape(60, 7, 10), "tree 8/3/3": TreeShape(8, 3, 3), "chain of 4": TreeShape(5, 3, 1)}
LAWS = {"T = 0": Sampling(), "T = 1": Sampling(temperature=1.0, seed=7)}
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("head")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--per-set", type=int, default=25)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-exact", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = read_drafter(options.head)
    target = Target.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), device="cpu", tap_layers=files.tap_layers
    )
    want_exact(target, not options.no_exact)
    head = files.bind(target)
    print(f"exact: {is_exact(target)}", flush=True)
    known = options.log.read_text().splitlines() if options.log.exists() else []
    rows = [json.loads(line) for line in known]
    with options.log.open("a") as log:
        for group in groups(options.questions, options.per_set):
            if group[0][0] not in {row["question"] for row in rows}:
                for row in answers(target, head, group, options.shapes, options.new_tokens):
                    rows.append(row)
                    log.write(json.dumps(row) + "\n")
                log.flush()
                report(rows)
    report(rows)


def groups(folder: Path, per_set: int) -> Iterator[list[tuple[str, list[str]]]]:
    """Names and turns of a batch's questions, the sets in turn."""
    sets = {
        path.parent.name: path.read_text().splitlines()[:per_set] for path in sorted(folder.glob("*/question.jsonl"))
    }
    for start in range(0, per_set, BATCH):
        for name, lines in sets.items():
            chosen = [json.loads(line) for line in lines[start : start + BATCH]]
            if chosen:
                yield [(f"{name} {row['question_id']}", row["turns"]) for row in chosen]


def answers(
    target: Target, head, group: list[tuple[str, list[str]]], shapes: list[str], new_tokens: int
) -> Iterator[dict]:
    """The rows of a group's first turns, then of its second ones."""
    chats: dict[str, list[dict[str, str]]] = {name: [] for name, _ in group}
    for turn in range(max(len(turns) for _, turns in group)):
        asked = {name: turns[turn] for name, turns in group if turn < len(turns)}
        for name, text in asked.items():
            chats[name].append({"role": "user", "content": text})
        prompts = [
            target.tokenizer.apply_chat_template(chats[name], add_generation_prompt=True)["input_ids"] for name in asked
        ]
        names = [f"{name}, turn {turn + 1}" if turn else name for name in asked]
        rows, plain = compared(target, head, names, prompts, shapes, new_tokens)
        yield from rows
        for name, ids in zip(asked, plain, strict=True):
            text = target.tokenizer.decode(ids, skip_special_tokens=True)
            chats[name].append({"role": "assistant", "content": text})


def compared(
    target: Target, head, names: list[str], prompts: list[list[int]], shapes: list[str], new_tokens: int
) -> tuple[list[dict], list[list[int]]]:
    """A row for each prompt: whether each way gave plain decoding's tokens, and its seconds. And plain decoding's
    greedy answers."""
    rows = [{"question": name, "same": {}, "seconds": {}} for name in names]
    greedy = []
    for law_name, law in LAWS.items():
        plain = []
        for row, prompt in zip(rows, prompts, strict=True):
            answer, row["seconds"][f"{law_name}, plain"] = timed(
                generate, target, None, prompt, max_new_tokens=new_tokens, sampling=law
            )
            plain.append(answer.token_ids)
            for name in shapes:
                way = f"{law_name}, {name}"
                found, row["seconds"][way] = timed(
                    generate, target, head, prompt, max_new_tokens=new_tokens, sampling=law, tree=SHAPES[name]
                )
                row["same"][way] = found.token_ids == plain[-1]
        greedy = greedy or plain
        if law.seed is not None:  # the i-th prompt of a batch draws with the seed plus i
            plain = [
                generate(
                    target, None, prompt, max_new_tokens=new_tokens, sampling=Sampling(1.0, seed=law.seed + index)
                ).token_ids
                for index, prompt in enumerate(prompts)
            ]  # fmt: skip
        for name in ("tree 8/3/3", "plain"):
            together, seconds = timed(
                generate_batch, target, None if name == "plain" else head, prompts, max_new_tokens=new_tokens,
                sampling=law, tree=SHAPES["tree 8/3/3"],
            )  # fmt: skip
            way = f"{law_name}, {name}, {BATCH} at once"
            for row, found, expected in zip(rows, together, plain, strict=True):
                row["same"][way], row["seconds"][way] = found.token_ids == expected, seconds / len(rows)
    return rows, greedy


def timed(function, *args, **options):
    """What it returns, and the process's seconds."""
    start = time.process_time()
    result = function(*args, **options)
    return result, time.process_time() - start


def report(rows: list[dict]) -> None:
    for way in dict.fromkeys(way for row in rows for way in row["seconds"]):
        its = [row for row in rows if way in row["seconds"]]  # of other --shapes, some rows do not have it
        seconds = sum(row["seconds"][way] for row in its)
        plain_s = sum(row["seconds"][f"{way.split(',')[0]}, plain"] for row in its)
        same = f"{sum(row['same'][way] for row in its)} of {len(its)}" if way in its[0]["same"] else ""
        print(f"{way:28} {same:12} {plain_s / seconds:.2f} x plain ({seconds / len(its):.2f} s per answer)")
    print(flush=True)


if __name__ == "__main__":
    main()
