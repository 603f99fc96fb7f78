"""The published reference head: exported, measured on the four sets and described, from one trained head.

    python benchmarks/reference_head.py TRAINED --target MODEL --name HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data-note heads/smollm2-135m-instruct/data.md --out heads/smollm2-135m-instruct/eagle3 \\
        --bench-dir bench --vllm .venv-vllm/bin/vllm --questions 20 --max-new-tokens 64

A *cell* is one temperature with one way to draft: our tuned tree, our given tree, vLLM's chain; it asks all four sets.
Every cell is `fledge bench`, plain beside speculative decoding, of the very files that are published. They run in
--work, where the files have short names, so that nothing published holds a path of this machine. A finished cell is not
run again, an unfinished one continues. The trees are tuned on fledge's `quick` questions; the four sets only judge.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_head_results import SETS, notes, refuse_differences, result_of, results_text
from safetensors import safe_open

from fledge import provenance
from fledge.bench.rows import folder_fingerprint
from fledge.cli import run_command
from fledge.commands.quickstart import num_gpus
from fledge.console import say
from fledge.drafters.eagle3.checkpoint import WEIGHTS
from fledge.errors import UserError
from fledge.export.servable import check_draft
from fledge.servers.processes import CPU_CACHE, ServerSettings, plan, running

LARGEST_BYTES = 25e6
TRAINED_FILES = ("config.json", WEIGHTS, "provenance.json")
TUNED_ON = 8  # questions at least
COUNTED = ("records", "tokens", "supervised")  # of a store's manifest
SETTINGS = (
    "draft_type", "draft_vocab_size", "ttt_steps", "depth_survival", "position_weights", "optim",
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "model_max_length", "num_train_epochs", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One temperature and one way to draft."""

    temperature: float
    way: str  # "tuned", "60/7/10" or "vllm-3": a chain of three

    @property
    def name(self) -> str:
        return f"T{self.temperature:g}-{self.way.replace('/', '-')}"

    @property
    def served(self) -> bool:
        return self.way.startswith("vllm-")


def main() -> None:
    args = parse_args()
    try:
        publish(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="the folder `fledge train` wrote")
    parser.add_argument("--target", required=True, help="the target's folder, or hub name")
    parser.add_argument("--name", required=True, help="the target's public name, for the card")
    parser.add_argument("--data-note", type=Path, required=True, help="markdown: what it was trained on, with licences")
    parser.add_argument("--out", type=Path, required=True, help="the published folder")
    parser.add_argument("--work", type=Path, help="everything else goes here; default: outputs/reference-head/NAME")
    parser.add_argument("--bench-dir", type=Path, default=os.environ.get("FLEDGE_BENCH_DIR"))
    parser.add_argument("--questions", type=int, default=80, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--tree", default="60/7/10", help="total_token/depth/top_k beside the tuned one")
    parser.add_argument("--vllm", help="its program; none: no vLLM cells")
    parser.add_argument("--chain", type=int, default=3, help="drafts per round of the vLLM cells")
    parser.add_argument("--base-port", type=int, default=6100, help="of the two vLLM servers")
    parser.add_argument("--license", default="apache-2.0", help="of the head")
    args = parser.parse_args()
    args.work = args.work or Path("outputs/reference-head") / args.out.name
    return args


def publish(args: argparse.Namespace) -> None:
    """Inputs, export, cells, card; the first thing that is missing or wrong ends it."""
    check_inputs(args)
    link(args)
    export(args)
    sha = check_weights(args.out / WEIGHTS)
    identity = {"head": sha, "target": folder_fingerprint(args.target)}
    for temperature in args.temperatures:
        tune(args, temperature, identity)
    cells = cells_of(args)
    run_cells(args, cells, identity)
    results = [{"temperature": cell.temperature, **result_of(folder_of(args, cell))} for cell in cells]
    refuse_differences(results)
    document = {
        "target": args.name, "weights_sha256": sha, "training": training(args.trained), "cells": results,
        "conditions": {"questions": args.questions, "max_new_tokens": args.max_new_tokens, "sets": SETS},
        "hardware": provenance.hardware(), "versions": provenance.versions(), "commit": provenance.commit(),
    }  # fmt: skip
    data = args.data_note.read_text(encoding="utf-8")
    provenance.write_json(args.out / "results.json", document)
    (args.out / "results.md").write_text(f"# {args.out.name}\n\n{results_text(document)}\n", encoding="utf-8")
    (args.work / "notes.md").write_text(notes(document, data, args.out.name), encoding="utf-8")
    export(args, "--notes", "notes.md")
    if check_weights(args.out / WEIGHTS) != sha:
        raise UserError(f"{args.out}: the weights changed while they were measured. Run it again.")
    refuse_paths(args)
    say(f"published: {args.out}")


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Without a GPU vLLM is measured at T = 0 only: its CPU build answers nonsense above it, with any head, and accepts
    nothing (docs/vllm-on-cpu.md)."""
    ways = ["tuned", args.tree, *([f"vllm-{args.chain}"] if args.vllm else [])]
    every = [Cell(temperature, way) for temperature in args.temperatures for way in ways]
    return [cell for cell in every if not cell.served or cell.temperature == 0 or num_gpus()]


# -- before ------------------------------------------------------------------------------------------------------------


def check_inputs(args: argparse.Namespace) -> None:
    """Everything that is needed is there, before hours are spent."""
    if args.bench_dir is None:
        raise UserError("no questions: give --bench-dir or set FLEDGE_BENCH_DIR.")
    needed = [args.trained / name for name in TRAINED_FILES] + [args.data_note]
    needed += [Path(args.bench_dir) / name / "question.jsonl" for name in SETS]
    needed += [Path(args.vllm)] if args.vllm else []
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise UserError(f"missing: {', '.join(missing)}.")
    training(args.trained)


def stores_of(run: dict[str, Any]) -> list[str]:
    """The stores of hidden states a run was trained on; earlier versions named the flag as AngelSlim does."""
    return run["config"].get("states") or run["config"].get("train_hidden_path") or []


def training(trained: Path) -> dict[str, Any]:
    """What the head saw: counts of its stores of hidden states, and the settings that matter.

    `stages` has a row for the run and one for each head it was started from (--init_from), the first run first; a
    store that two of them read counts once in the sums. Of a published head, stages are taken from its results.
    """
    runs, published = runs_of(trained)
    if not all(stores_of(run) for run in runs):
        raise UserError(f"{trained}: trained online; only a store's manifest says how many tokens were trained on.")
    counts = {store: counts_of(store, trained) for run in runs for store in stores_of(run)}
    stages = [*published.get("stages", ())]
    stages += [
        {
            **summed(counts[store] for store in stores_of(run)),
            "epochs": run["metrics"].get("epoch"), "steps": run["steps"],
        }
        for run in runs
    ]  # fmt: skip
    last = runs[-1]
    return {
        **summed([*counts.values(), *([published] if published else [])]),
        "stages": stages, "predicted_tau": last["metrics"].get("eval_tau"),
        **{key: last["config"].get(key) for key in SETTINGS},
    }  # fmt: skip


def runs_of(trained: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The provenance of the head and of those before it, the first one first; what is known of the training of the
    published head that all of them began with, if they did."""
    if not (trained / "provenance.json").is_file() and (trained / "results.json").is_file():
        return [], json.loads((trained / "results.json").read_text(encoding="utf-8"))["training"]
    run = json.loads((trained / "provenance.json").read_text(encoding="utf-8"))
    before = run["config"].get("init_from")
    runs, published = runs_of(Path(before)) if before else ([], {})
    return [*runs, run], published


def counts_of(store: str, trained: Path) -> dict[str, int]:
    manifest = Path(store) / "manifest.json"
    if not manifest.is_file():
        raise UserError(
            f"{trained / 'provenance.json'}: the store of hidden states {store} is not there any more, and only a "
            "store's manifest says how many tokens were trained on."
        )
    counts = json.loads(manifest.read_text(encoding="utf-8"))["counts"]
    return {key: counts[key] for key in COUNTED}


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    listed = list(counts)
    return {key: sum(count[key] for count in listed) for key in COUNTED}


def link(args: argparse.Namespace) -> None:
    """Short names in the work folder."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    links = {"trained": args.trained, args.out.name: args.out, "bench": args.bench_dir}
    if Path(args.target).is_dir():
        links["target"] = args.target
    for name, place in links.items():
        (args.work / name).unlink(missing_ok=True)
        (args.work / name).symlink_to(Path(place).resolve(), target_is_directory=True)


def export(args: argparse.Namespace, *more: str) -> None:
    fledge(args.work, "export", "trained", "--to", "vllm", "--output-dir", args.out.name, "--target", args.name,
           "--license", args.license, *more)  # fmt: skip


def check_weights(path: Path) -> str:
    """Their sha256, when they are bf16 and small enough to be kept in the repository."""
    with safe_open(path, "pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    floats = {str(dtype) for dtype in dtypes if dtype.is_floating_point}
    if floats != {"torch.bfloat16"} or path.stat().st_size > LARGEST_BYTES:
        raise UserError(
            f"{path}: {', '.join(sorted(floats))}, {path.stat().st_size / 1e6:.1f} MB; published are bf16 and at most "
            f"{LARGEST_BYTES / 1e6:.0f} MB. Train with --save_dtype bfloat16 and a smaller --draft_vocab_size."
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- cells -------------------------------------------------------------------------------------------------------------


def fledge(work: Path, *words: str) -> None:
    """One command, as typed in the work folder."""
    say("$ fledge " + shlex.join(words))
    typed = sys.argv
    with contextlib.chdir(work):
        sys.argv = ["fledge", *words]  # what the command writes about itself
        try:
            if status := run_command(words[0], words[1:]):
                raise UserError(f"`fledge {words[0]}` ended with status {status}; the same command continues.")
        finally:
            sys.argv = typed


def common(args: argparse.Namespace, temperature: float) -> list[str]:
    target = "target" if Path(args.target).is_dir() else args.target
    return ["bench", "--target", target, "--draft", args.out.name, "--temperature", f"{temperature:g}",
            "--max-new-tokens", str(args.max_new_tokens)]  # fmt: skip


def tune(args: argparse.Namespace, temperature: float, identity: dict[str, str]) -> None:
    words = [*common(args, temperature), "--tune", "--bench-name", "quick", "--question-end",
             str(max(TUNED_ON, args.questions)), "--num-gpus-total", str(num_gpus()), "--profile-path",
             f"profile-T{temperature:g}.json"]  # fmt: skip
    mark, key = args.work / f"tune-T{temperature:g}.json", {"words": words, **identity}
    if not is_done(mark, key):
        run_once(args, mark, key)


def words_of(args: argparse.Namespace, cell: Cell) -> list[str]:
    """The command of a cell."""
    if cell.served:
        plain, eagle = (f"http://127.0.0.1:{args.base_port + index}" for index in range(2))
        way = ["--backend", "server", "--baseline-url", plain, "--eagle-url", eagle, "--num-speculative-tokens",
               str(args.chain)]  # fmt: skip
    elif cell.way == "tuned":
        way = ["--total-token", "auto", "--profile-path", f"profile-T{cell.temperature:g}.json"]
    else:
        nodes, depth, top_k = cell.way.split("/")
        way = ["--total-token", nodes, "--depth", depth, "--top-k", top_k]
    return [*common(args, cell.temperature), "--bench-name", *SETS, "--bench-dir", "bench", "--question-end",
            str(args.questions), "--num-gpus-total", str(num_gpus()), "--samples", "0", *way,
            "--output-dir", f"cells/{cell.name}"]  # fmt: skip


def folder_of(args: argparse.Namespace, cell: Cell) -> Path:
    return args.work / "cells" / cell.name


def run_cells(args: argparse.Namespace, cells: list[Cell], identity: dict[str, str]) -> None:
    """Every cell that is not finished; vLLM is started only for its own."""
    marks = {cell: folder_of(args, cell) / "cell.json" for cell in cells}
    keys = {cell: {"words": words_of(args, cell), **identity} for cell in cells}
    missing = [cell for cell in cells if not is_done(marks[cell], keys[cell])]
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are finished")
    for cell in (cell for cell in missing if not cell.served):
        run_once(args, marks[cell], keys[cell])
    if served := [cell for cell in missing if cell.served]:
        with servers(args) as version:
            for cell in served:
                run_once(args, marks[cell], keys[cell], vllm=version)


def is_done(mark: Path, key: dict[str, Any]) -> bool:
    """Whether this very thing was done: another head, target or flag is another thing."""
    return mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["key"] == key


def run_once(args: argparse.Namespace, mark: Path, key: dict[str, Any], **more: Any) -> None:
    """Run its command; the mark is written last."""
    mark.unlink(missing_ok=True)
    start = time.monotonic()
    fledge(args.work, *key["words"])
    provenance.write_json(mark, {"key": key, "seconds": round(time.monotonic() - start, 1), **more})


@contextlib.contextmanager
def servers(args: argparse.Namespace) -> Iterator[str]:
    """Both servers up; vLLM's version."""
    check_draft(str(args.out), args.target, args.chain)
    os.environ.setdefault(CPU_CACHE, "1")  # GiB: one request in flight
    both = []
    for index, draft in enumerate((None, str(args.out.resolve()))):
        serve = ServerSettings(
            target=args.target, num_servers=1, base_port=args.base_port + index, draft=draft,
            num_speculative_tokens=args.chain, max_model_len=4096, output_dir=args.work / "servers", vllm=args.vllm,
            vllm_args=("--no-enable-prefix-caching", *(("--gpu-memory-utilization", "0.4") if num_gpus() else ())),
        )  # fmt: skip
        both += plan(serve, ["0"] if num_gpus() else [])
    with running(both, 1800.0):
        with urllib.request.urlopen(f"{both[0].url}/version", timeout=30) as response:
            version = json.load(response)["version"]
        yield version


def refuse_paths(args: argparse.Namespace) -> None:
    """Published text names no folder of this machine."""
    folders = (args.trained, args.target, args.work, args.bench_dir, Path.home())
    private = {str(Path(folder).resolve()) for folder in folders} - {"/"}
    for path in (path for path in args.out.iterdir() if path.suffix in (".json", ".md")):
        if found := [name for name in private if name in path.read_text(encoding="utf-8")]:
            raise UserError(f"{path}: names {', '.join(found)}, a folder of this machine.")


if __name__ == "__main__":
    main()
