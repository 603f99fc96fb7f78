"""From the finished cells of `reference_head.py` to what is published of them: figures, a table, the card's notes."""

import json
import shlex
from pathlib import Path
from typing import Any

from fledge.bench.report import interval_text
from fledge.errors import UserError

SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")


def result_of(folder: Path) -> dict[str, Any]:
    """What is published of a finished cell."""
    mark, summary = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("cell.json", "summary.json"))
    settings = summary["settings"]
    return {
        "name": folder.name, "vllm": mark.get("vllm"),
        "drafts": settings.get("tree") or {"chain": settings["num_speculative_tokens"]},
        "command": "fledge " + shlex.join(mark["key"]["words"]), "seconds": mark["seconds"],
        "commit": summary["provenance"]["commit"],
        "sets": {name.removesuffix(", 1 in flight"): figures_of(part) for name, part in summary["sets"].items()},
    }  # fmt: skip


def figures_of(figures: dict[str, Any]) -> dict[str, Any]:
    """What is published of a set."""
    accepted, quality = figures.get("acceptance"), figures.get("quality") or {}
    if accepted is None or figures.get("speedup") is None:
        raise UserError("a set has no tau or no speed-up: the answers are too short. Raise --max-new-tokens.")
    return {
        "questions": figures["questions"], "tau": accepted["tau"], "rounds": accepted["rounds"],
        "by_position": accepted["by_position"],
        "speedup": {key: figures["speedup"][key] for key in ("value", "low", "high")},
        "tokens_per_s": {side: figures[side]["tokens_per_s"] for side in ("baseline", "eagle")},
        "quality": quality,
    }  # fmt: skip


def refuse_differences(results: list[dict[str, Any]]) -> None:
    """Nothing is published of a head, or an engine, whose greedy answers part where no rounding parts them."""
    wrong = [
        f"{result['name']} {name}: {figures['quality']['unexplained']} of {figures['quality']['compared']}"
        for result in results for name, figures in result["sets"].items()
        if name != "all" and figures["quality"].get("unexplained")
    ]  # fmt: skip
    if wrong:
        raise UserError(f"answers differ from plain decoding where no near-tie explains it ({'; '.join(wrong)}).")


def way_of(result: dict[str, Any]) -> str:
    if result["vllm"]:
        return f"vLLM {result['vllm']}, chain of {result['drafts']['chain']}"
    shape = "/".join(str(result["drafts"][key]) for key in ("total_token", "depth", "top_k"))
    return f"fledge, tree {shape}" + (" (tuned)" if result["name"].endswith("tuned") else "")


def results_text(document: dict[str, Any]) -> str:
    """Conditions and tables, for results.md and the card."""
    conditions, hardware = document["conditions"], document["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    lines = [
        f"Questions asked of each set: {conditions['questions']}; answers of at most "
        f"{conditions['max_new_tokens']} tokens, bf16, {machine}; plain and speculative decoding in turns. Each cell: "
        f"tau, the speed-up over the same program without the head. tau = tokens per target forward, the target's own "
        f"included. Trees: nodes/depth/top-k; the tuned one is `fledge bench --tune`'s choice for this machine. The "
        f"sets were used for evaluation only.",
        "", "| T | drafts | " + " | ".join(SETS) + " | all: tau | all: speed-up (95 %) | identical |",
        "|---" * (len(SETS) + 5) + "|",
    ]  # fmt: skip
    for result in document["cells"]:
        sets, whole = result["sets"], result["sets"].get("all") or {}
        cells = [f"{sets[name]['tau']:.2f}, {sets[name]['speedup']['value']:.2f} x" for name in SETS]
        asked = [sets[name]["quality"] for name in SETS if "compared" in sets[name]["quality"]]
        same = f"{sum(q['identical'] for q in asked)} of {sum(q['compared'] for q in asked)}" if asked else "–"
        cells += [f"{pooled_tau(sets):.2f}", interval_text(whole.get("speedup")), same]
        lines.append(f"| {result['temperature']:g} | {way_of(result)} | {' | '.join(cells)} |")
    served = {result["temperature"] for result in document["cells"] if result["vllm"]}
    if served and served != {result["temperature"] for result in document["cells"]}:
        lines += ["", "vLLM's CPU build samples wrongly when it drafts, with any head: it was measured at T = 0 only."]
    return "\n".join(lines)


def pooled_tau(sets: dict[str, Any]) -> float:
    rounds = sum(sets[name]["rounds"] for name in SETS)
    return sum(sets[name]["tau"] * sets[name]["rounds"] for name in SETS) / rounds


def notes(document: dict[str, Any], data: str, folder: str) -> str:
    """What the card says beyond what every export's card says: data, figures, use."""
    facts, target = document["training"], document["target"]
    tuned = next(result["drafts"] for result in document["cells"] if result["name"].endswith("tuned"))
    flags = f"--total-token {tuned['total_token']} --depth {tuned['depth']} --top-k {tuned['top_k']}"
    return (
        f"## Training data\n\n{data.strip()}\n\n"
        f"{facts['records']:,} conversations, {facts['supervised']:,} tokens of answers ({facts['tokens']:,} with the "
        f"questions; a held-out share included); {stages_text(facts['stages'])}.\n\n"
        f"## Results\n\n{results_text(document)}\n\nCommands and more figures: results.json.\n\n"
        f"## With fledge\n\n```bash\nfledge decode --target {target} --draft {folder} {flags} "
        f'--prompt "Why is the sky blue?"\nfledge bench --target {target} --draft {folder} {flags} '
        f"--bench-name quick\n```\n"
    )


def stages_text(stages: list[dict[str, Any]]) -> str:
    """The passes: "1 pass", or of each stage its own."""
    passes = [f"{stage['epochs']:.3g} pass{'es' if stage['epochs'] != 1 else ''}" for stage in stages]
    if len(stages) == 1:
        return passes[0]
    each = ", then ".join(f"{count} over {stage['records']:,}" for count, stage in zip(passes, stages, strict=True))
    return f"trained in {len(stages)} runs, each started from the head of the one before: {each}"
