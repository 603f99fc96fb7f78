"""What needs a GPU, in one process: sections, the most valuable first, each with a budget in seconds.

    python benchmarks/on_gpu.py --out gpu/                            as many sections as fit --seconds
    python benchmarks/on_gpu.py --out gpu/ --only plain train_2048    these
    python benchmarks/on_gpu.py --list                                names, budgets, what each measures
    python benchmarks/on_gpu.py --out gpu/ --device cpu --small       a rehearsal: tiny shapes, on any machine

A line of JSON is added to OUT/on_gpu.jsonl as each section ends, and OUT/on_gpu.json is written anew: one record of all
lines, so several short runs into one folder add up. It has the last good result of each section with the card, versions
and commit it is of. A section that fails does not stop the others; the exit status says whether one did. A section is
left out when the time left is less than its budget, and stopped when it takes twice as long.

Shapes are Qwen3-8B's with random weights, which cost what trained ones do. `gpu_decoding.py`, `gpu_training.py` and
`gpu_commands.py` have the sections;
docs/performance.md has the figures.
"""

import argparse
import importlib
import json
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_bench import SECTIONS as KNOWN
from gpu_bench import Bench, LeftOut, Section

from fledge import provenance
from fledge.outputs import write_json

for module in ("gpu_decoding", "gpu_training", "gpu_commands"):
    importlib.import_module(module)
FIRST = (  # the others follow as they stand in their files
    "device", "commands", "captured", "train_equal", "extract_equal", "plain", "tree_rounds", "same_bits", "profile",
    "products", "train_2048", "train_2048_depths", "train_turns", "train_profile", "head", "attention",
)  # fmt: skip
SECTIONS = {name: KNOWN[name] for name in (*FIRST, *(name for name in KNOWN if name not in FIRST))}
LINES, RECORD = "on_gpu.jsonl", "on_gpu.json"
OVER = 2.0  # times its budget, after which a section is stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and say with the exit status whether all went well."""
    args = parsed(argv)
    if args.list:
        for name, section in SECTIONS.items():
            print(f"{name:16} {section.budget_s:4} s   {section.what}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    begin, bench, failed = time.monotonic(), Bench.of(args), []
    source = origin(args, sys.argv[1:] if argv is None else argv)
    for name in args.only or SECTIONS:
        left = args.seconds - (time.monotonic() - begin)
        line = {"section": name, **source, **timed_section(SECTIONS[name], bench, left)}
        failed += [name] if "error" in line else []
        with (args.out / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {key: value for key, value in line.items() if key not in source and key != "trace"}
        print(json.dumps(shown), flush=True)
        if bench.on_gpu:
            torch.cuda.empty_cache()
    write_json(args.out / RECORD, merged(read_lines(args.out / LINES)))
    if failed:
        print(f"failed: {', '.join(failed)}; traces are in {args.out / LINES}")
    return 1 if failed else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the lines and the record")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help="these, in this order")
    parser.add_argument("--seconds", type=float, default=420, help="of all sections together")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, few repeats: a rehearsal")
    parser.add_argument("--target", type=Path, help="a real target's folder, for the section `head`")
    parser.add_argument("--draft", type=Path, help="its head's folder")
    args = parser.parse_args(argv)
    if not args.list and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this Python sees no CUDA device. Run it where there is one, or rehearse: --device cpu --small.")
    return args


def origin(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """What says where a line came from."""
    facts = provenance.collect() | {"command": shlex.join(["python", "benchmarks/on_gpu.py", *words])}
    card = torch.cuda.get_device_name() if args.device == "cuda" else facts["hardware"]["cpu"]
    return {"card": card, "small": args.small, **{key: facts[key] for key in ("command", "versions", "commit")}}


def timed_section(section: Section, bench: Bench, left_s: float) -> dict[str, Any]:
    """What a section found, or why it found nothing."""
    begin = time.monotonic()
    if left_s < section.budget_s:
        return {"left_out": f"{left_s:.0f} s are left, its budget is {section.budget_s} s"}
    try:
        with at_most(OVER * section.budget_s):
            found = {"result": section.run(bench)}
    except LeftOut as reason:
        found = {"left_out": str(reason)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-3000:]}
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(time.monotonic() - begin, 1), **found}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block after so many seconds, as soon as Python is asked again."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    other = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *other)
        signal.signal(signal.SIGALRM, before)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of all runs; one that a run left half written is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def merged(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One record: for each section of the table its last good line, else its last one; and the runs they are of."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "result" in line or "result" not in best.get(line["section"], {}):
            best[line["section"]] = line
    runs: list[dict[str, Any]] = []
    sections = {}
    for name in (name for name in SECTIONS if name in best):
        line = dict(best[name])
        run = {key: line.pop(key, None) for key in ("card", "small", "command", "versions", "commit")}
        if run not in runs:
            runs.append(run)
        line.pop("trace", None)
        sections[name] = {**{key: value for key, value in line.items() if key != "section"}, "run": runs.index(run)}
    return {"runs": runs, "sections": sections, "missing": [name for name in SECTIONS if name not in best]}


if __name__ == "__main__":
    raise SystemExit(main())
