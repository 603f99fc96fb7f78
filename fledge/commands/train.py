"""`fledge train`: data or stored states in, a draft head out. `fledge.train.run` does it.

Our flags are read as every command's are; what is left belongs to transformers' Trainer, under its own names. `--help`
answers without importing that library, so the Trainer's most used arguments are described here once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING

from fledge.commands.flags import flags_of
from fledge.commands.parser import parse, words_of
from fledge.errors import UserError
from fledge.http_client import base_url
from fledge.ranges import Count, NotNegative, Positive, Seed, check_ranges
from fledge.train.settings import DraftSettings, EvaluationSettings, InputSettings

if TYPE_CHECKING:
    from fledge.train.arguments import TrainSettings


@dataclass(kw_only=True)
class TrainArgs:
    """Our flags."""

    inputs: InputSettings = field(default_factory=InputSettings)
    draft: DraftSettings = field(default_factory=DraftSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


@dataclass(kw_only=True)
class TrainerHelp:
    """The Trainer's arguments that most runs need, for `--help`."""

    output_dir: str
    """Where the head, its checkpoints and its provenance go. A run that was stopped there continues."""
    overwrite: bool = False
    """Replace what lies there under names that this command writes."""
    num_train_epochs: Positive = 3
    """Passes over the data."""
    per_device_train_batch_size: Count = 4
    """Sequences per device and forward pass; never padded."""
    gradient_accumulation_steps: Count = 1
    """Passes per update."""
    learning_rate: NotNegative | None = None
    """Peak rate. None: 0.4 / hidden size, at most 1e-3 (1e-4 at 4096)."""
    save_strategy: str = "steps"
    """When checkpoints are written: no, epoch, or steps (every --save_steps)."""
    eval_strategy: str = "no"
    """When the loss on held-out data is computed: no, epoch, or steps (every --eval_steps)."""
    report_to: str = "none"
    """wandb, tensorboard, trackio, ... (several: a,b), or none."""
    run_name: str | None = None
    """Name of the run in them."""
    verbose: bool = False
    """Print the draft's config, and every metric at each log step."""
    deepspeed: str | None = None
    """A DeepSpeed config."""
    seed: Seed = 42
    """Seed of the weights, the order and the draws."""


@dataclass(kw_only=True)
class HelpArgs(TrainerHelp):
    """What `--help` shows."""

    ours: TrainArgs = field(default_factory=TrainArgs)


MAIN = (
    "target", "data", "states", "output_dir", "overwrite", "eval_fraction", "eval_data", "chat_template_type",
    "model_max_length", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "draft_vocab_size", "draft_type", "init_from", "ttt_steps", "depth_survival", "save_strategy",
    "eval_strategy", "eval_decode_steps", "report_to", "run_name", "verbose", "deepspeed",
    "seed",
)  # fmt: skip
# Flags of earlier versions: the value that asks for what is done anyway, and why there is no other.
REMOVED = {
    "loss_type": ("kl", "the loss is the cross-entropy to the target (kl); heads trained with lk accepted less"),
    "step_decay": ("0.8", "the fixed weight of TTT step k is 0.8 ** k (--position_weights fixed)"),
    "head_rank": ("", "lm_head is trained whole"),
    "sliding_window": ("", "a fresh draft's attention reaches back to the first token"),
    "eval_decode_max_new_tokens": ("64", "prompts are decoded for 64 tokens"),
    "eval_decode_tree": ("60 5 10", "prompts are decoded with the default tree"),
}


def parse_args(_args_class: type, argv: Sequence[str], *, prog: str, description: str = "") -> "TrainSettings":
    """Flags and `--config recipe.yaml` to everything a run is told."""
    from transformers import HfArgumentParser

    from fledge.train.arguments import TrainerArguments, TrainSettings, check_report_to

    theirs = [one.name for one in fields(TrainerArguments) if one.init]
    words = words_of(TrainArgs, argv, theirs, REMOVED)
    ours, rest = _apart(words)
    if not any(word.partition("=")[0] == "--output_dir" for word in rest):  # the library has a default
        raise UserError("--output-dir is needed: the folder for the head, its checkpoints and its provenance.")
    args = parse(TrainArgs, ours, prog=prog, description=description)
    try:
        (trainer,) = HfArgumentParser(TrainerArguments, prog=prog, allow_abbrev=False).parse_args_into_dataclasses(rest)  # type: ignore[arg-type]
    except PackageNotFoundError as error:  # DeepSpeed, say
        found = str(error.name).partition(" and is required")[0]
        raise UserError(f"{found}. Install it, or leave its flag out.") from None
    except (ValueError, ImportError) as error:  # ImportError: what a flag asks for is not installed
        raise UserError(f"{error} (see `{prog} --help-all`)") from None
    check_ranges(trainer, separator="_")
    check_report_to(trainer)
    for server in args.inputs.server:
        base_url(server)
    return TrainSettings(inputs=args.inputs, draft=args.draft, evaluation=args.evaluation, trainer=trainer)


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our flags with their values, and the Trainer's with theirs."""
    names = {flag.name for flag in flags_of(TrainArgs)}
    ours: list[str] = []
    theirs: list[str] = []
    current = ours
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            current = ours if name in names or name.removeprefix("no_") in names else theirs
        current.append(word)
    return ours, theirs


def other_flags() -> tuple[type, ...]:
    """The Trainer's arguments, for `--help-all`."""
    from fledge.train.arguments import TrainerArguments

    return (TrainerArguments,)


def train(args: "TrainSettings") -> None:
    """Train a draft head: online (--data, the target in this process) or offline (--states).

    Ends with a head in --output-dir that fledge, vLLM and SGLang load. A run that was stopped continues where it was.
    """
    from fledge.train import run

    run.train(args)
