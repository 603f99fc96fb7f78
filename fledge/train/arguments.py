"""`fledge train`'s flags: ours in groups, then every argument of transformers' Trainer under its own name.

The names are AngelSlim's where it has one (`--target_model_name_or_path`, `--train_hidden_path`, ...); `-` and `_` are
the same. Not given is None: what can be derived is derived, printed, and written beside the head.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from fledge.config import OVERWRITE, field_names, read_recipe, refuse_empty
from fledge.data.conversations import COLUMNS_HELP, REPEATED_IDS_HELP, DataFormat, RepeatedIds
from fledge.data.image_urls import ALLOW_HELP
from fledge.data.traces import UNTRACED_HELP, Untraced
from fledge.drafters.loss import LossSettings
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError, nearest
from fledge.http_client import base_url
from fledge.ranges import (
    Count,
    Natural,
    NotNegative,
    PartialShare,
    Positive,
    PositiveShare,
    Seed,
    Share,
    Whole,
    check_ranges,
)
from fledge.servers.states_folder import SERVER_FOLDER

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def _flag(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class DataArguments:
    """Where the training data comes from."""

    _argument_group_name = "data"

    target_model_name_or_path: str | None = _flag(None, "The target: a transformers model folder or hub name.")
    target_backend: Literal["hf", "vllm"] = _flag("hf", "hf: the live target in this process. vllm: on the servers "
                                                  "of --server, which extract hidden states.")  # fmt: skip
    server: list[str] = _flag([], "With --target_backend vllm: base URLs, e.g. http://localhost:8000.")
    server_folder: str = _flag(str(SERVER_FOLDER), "With --target_backend vllm: the folder where the servers write "
                               "states. Files anywhere else are neither read nor removed.")  # fmt: skip
    train_data_path: list[str] = _flag([], "Conversations to train on, live: files, folders or hub names.")
    eval_data_path: list[str] = _flag([], "Conversations to evaluate on. Empty: --eval_fraction of the training data.")
    train_hidden_path: list[str] = _flag([], "Stored hidden states to train on (made by `fledge extract`).")
    eval_hidden_path: list[str] = _flag([], "Stored hidden states to evaluate on.")
    data_format: DataFormat = _flag("auto", "Format of the rows; auto looks at each.")
    columns: list[str] = _flag([], COLUMNS_HELP)
    repeated_ids: RepeatedIds = _flag("reject", REPEATED_IDS_HELP)
    untraced: Untraced = _flag("reject", UNTRACED_HELP)
    chat_template_type: str | None = _flag(None, "Named chat template that overrides the tokenizer's own.")
    train_last_turn_only: bool = _flag(False, "Supervise only the last answer of each conversation.")
    model_max_length: Count = _flag(2048, "Longest sample in tokens; longer ones are cut and counted.")
    eval_fraction: PartialShare = _flag(0.0, "Share of the conversations held out when no eval data is given.")
    max_samples: Count | None = _flag(None, "Use only the first so many samples.")
    max_reject_share: Share = _flag(0.05, "Stop when more than this share of the rows is unusable.")
    lm_head_key: str | None = _flag(None, "Name of the target head's tensor; not needed: the model is asked.")
    num_proc: Count | None = _flag(None, "Processes for tokenisation.")
    max_pixels: Count | None = _flag(None, "Vision-language targets: area to which larger pictures are reduced.")
    min_pixels: Count | None = _flag(None, "Vision-language targets: area to which smaller pictures are enlarged.")
    allow_image_urls: bool = _flag(False, ALLOW_HELP)


@dataclass(kw_only=True)
class DraftArguments:
    """The draft head and its loss."""

    _argument_group_name = "draft"

    draft_model_config_path: str | None = _flag(None, "JSON with sizes of the draft. Empty: derived from the target.")
    draft_vocab_size: Natural | None = _flag(None, "Target tokens the draft may propose, most frequent first. 0: all. "
                                         "Empty: the config file's, else 32000.")  # fmt: skip
    draft_type: Literal["eagle3", "eagle3.1"] = _flag("eagle3", "eagle3.1 adds a norm per tap and post-norm feedback.")
    tap_layers: list[Natural] = _flag([], "Decoder layers whose inputs feed the draft. Empty: 2, N // 2, N - 3.")
    init_from: str | None = _flag(None, "Start from this head instead of a fresh one.")
    ttt_steps: Count = _flag(7, "Draft steps unrolled per position (training-time test).")
    position_weights: Literal["fixed", "dynamic"] = _flag(
        "dynamic", "dynamic: what a step adds to the accept length that the draft expects. fixed: 0.8 ** k."
    )
    depth_survival: PositiveShare = _flag(  # 0.8: dev/log, "Our recipe beside the common one, 40 questions a set"
        0.8, "Share of the positions that go on from one TTT step to the next, drawn at random; their loss counts so "
        "much more, so that the expected gradient is that of all. 1: all, to full depth."
    )  # fmt: skip
    loss_average: Literal["sequence", "token"] = _flag("sequence", "Mean within sequences first, or over all tokens.")
    target_dtype: Dtype = _flag("auto", "dtype of the live target.")
    save_dtype: Literal["bfloat16", "float16", "float32"] = _flag("bfloat16", "dtype of the final head's file.")

    def loss_settings(self) -> LossSettings:
        return LossSettings(position_weights=self.position_weights, average=self.loss_average)


@dataclass(kw_only=True)
class EvaluationArguments:
    """Evaluation by real decoding; --eval_strategy and --eval_steps are for the loss."""

    _argument_group_name = "evaluation by decoding"

    eval_decode_steps: Natural = _flag(0, "Every so many steps, decode held-out prompts with the head as it is, and "
                                       "keep the best by tau in OUTPUT_DIR/best. 0: never.")  # fmt: skip
    eval_decode_prompts: Count = _flag(16, "Held-out prompts to decode: first turns of the evaluation data.")
    eval_decode_max_new_tokens: Count = _flag(64, "Tokens per prompt, greedy.")
    eval_decode_tree: list[Natural] = _flag([60, 5, 10], "The tree: total tokens, depth, top-k.")
    eval_decode_load_best: bool = _flag(True, "The final head is the best by tau rather than the last.")

    def tree(self) -> TreeShape:
        numbers = self.eval_decode_tree
        if len(numbers) != 3 or numbers[0] < 2 or numbers[2] < 1:
            raise UserError(
                f"--eval_decode_tree {' '.join(map(str, numbers))}: needed are three numbers: total tokens (at least "
                f"2), depth, top-k (at least 1)."
            )
        return TreeShape(*numbers)


@dataclass
class TrainerArguments(TrainingArguments):
    """transformers' TrainingArguments with this job's defaults; every other default is the library's."""

    _argument_group_name = "trainer (transformers' TrainingArguments)"
    RANGES = {  # of the fields that are the library's own
        "num_train_epochs": Positive, "max_steps": Whole, "weight_decay": NotNegative,
        "adam_beta1": PartialShare, "adam_epsilon": Positive, "gradient_accumulation_steps": Count,
        "label_smoothing_factor": Share, "neftune_noise_alpha": NotNegative | None,
        "torch_empty_cache_steps": Count | None, "eval_steps": NotNegative | None, "eval_delay": NotNegative,
        "eval_accumulation_steps": Count | None, "save_steps": NotNegative, "seed": Seed, "data_seed": Seed | None,
        "dataloader_num_workers": Natural, "dataloader_prefetch_factor": Count | None,
        "ddp_bucket_cap_mb": Count | None, "ddp_timeout": Count, "local_rank": Whole,
    }  # fmt: skip

    output_dir: str | None = _flag(None, "Where the head, its checkpoints and its provenance go.")
    overwrite: bool = _flag(False, OVERWRITE + " An earlier run there that is not continued is deleted.")
    per_device_train_batch_size: Count = _flag(4, "Sequences per device and forward pass; never padded.")
    per_device_eval_batch_size: Count = _flag(4, "Sequences per device and evaluation pass.")
    learning_rate: NotNegative | None = _flag(  # type: ignore[assignment]
        None, "Peak rate. Empty: 0.4 / hidden size, at most 1e-3 (1e-4 at 4096)."
    )
    lr_scheduler_type: str = _flag("cosine", "Schedule after warm-up.")
    warmup_ratio: Share | None = _flag(0.03, "Share of the steps spent warming up, unless --warmup_steps is given.")
    warmup_steps: NotNegative | None = _flag(  # type: ignore[assignment]
        None, "Steps spent warming up; below 1, a share of them. Empty: --warmup_ratio."
    )
    adam_beta2: PartialShare = _flag(0.95, "Second AdamW beta.")
    matrix_optim: Literal["auto", "muon", "same"] = _flag(
        "auto", "muon: the draft's matrices (not lm_head) by Muon, the rest by --optim. same: all by --optim. auto: "
        "muon where the head is whole on every process, same under FSDP and DeepSpeed."
    )  # fmt: skip
    max_grad_norm: NotNegative = _flag(0.5, "Gradient clipping.")
    bf16: bool = _flag(True, "bfloat16 mixed precision with fp32 master weights.")
    logging_steps: NotNegative = _flag(10, "Steps between log lines.")
    save_total_limit: Natural | None = _flag(2, "Checkpoints kept for resuming.")
    report_to: str | None = _flag("none", "wandb, tensorboard, trackio, ... or none.")
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute every TTT step but its input again in the backward: less memory, more time.",
            "nargs": "?", "const": True,
        },
    )  # fmt: skip
    remove_unused_columns: bool = _flag(False, "Not used: samples are records.")
    ddp_find_unused_parameters: bool | None = _flag(False, "Every step reaches every parameter: no search.")
    logging_nan_inf_filter: bool = _flag(False, "False: a NaN loss stops the run.")
    resume_from_checkpoint: str | None = _flag(
        "auto", "auto: continue the run in --output_dir when there is one. Or a checkpoint folder, or False."
    )

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without the token: with --push_to_hub the library saves and uploads `training_args.bin`."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio or 0.0  # below 1, the library reads it as a share
        if self.activation_checkpointing and not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = True  # the name before transformers had this one
        super().__post_init__()


@dataclass(kw_only=True)
class TrainArgs:
    """All of it."""

    data: DataArguments
    draft: DraftArguments
    evaluation: EvaluationArguments
    trainer: TrainerArguments

    def resolved(self) -> dict[str, Any]:
        """Every field as written beside the head; running from this file repeats the run."""
        ours: list[Any] = [self.data, self.draft, self.evaluation]
        parts = [*(dataclasses.asdict(part) for part in ours), self.trainer.to_dict()]
        return {key: value for part in parts for key, value in part.items()}


GROUPS = (DataArguments, DraftArguments, EvaluationArguments, TrainerArguments)
# Flags of earlier versions: the value that asks for what is done anyway, and why there is no other.
REMOVED = {
    "loss_type": ("kl", "the loss is the cross-entropy to the target (kl); heads trained with lk accepted less"),
    "step_decay": ("0.8", "the fixed weight of TTT step k is 0.8 ** k (--position_weights fixed)"),
    "head_rank": ("", "lm_head is trained whole"),
    "sliding_window": (
        "",
        "a fresh draft's attention reaches back to the first token",
    ),
}


class RemovedFlag(argparse.Action):
    """Accepts the value that asks for what is done anyway, so that older recipes run; any other is an error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        done_anyway, reason = REMOVED[self.dest]
        if values != done_anyway:
            raise UserError(f"--{self.dest} {values} is no longer an option: {reason}. Leave --{self.dest} out.")


def parse_args(_args_class: type, argv: Sequence[str], *, prog: str, description: str) -> TrainArgs:
    """Flags and `--config recipe.yaml` to TrainArgs."""
    known = [name for group in GROUPS for name in field_names(group)]
    parser = HfArgumentParser(
        GROUPS, prog=prog, description=description, allow_abbrev=False,  # type: ignore[arg-type]
    )  # fmt: skip
    parser.add_argument("--config", help="Recipe: a YAML file of these flags; flags on the command line win.")
    for name in REMOVED:
        spelled = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spelled, action=RemovedFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    words = _with_recipe(list(argv), [*known, *REMOVED])
    refuse_empty(words)
    try:
        parsed = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # ImportError: what a flag asks for is not installed
        raise UserError(f"{error} (see `{prog} --help`)") from None
    data, draft, evaluation, trainer, *_, rest = parsed
    if rest:
        name = rest[0].lstrip("-").partition("=")[0].replace("-", "_")
        raise UserError(f"unknown flag {rest[0]!r}{nearest(name, known)}.")
    if not any(word.replace("-", "_").startswith("__output_dir") for word in words):  # the library has a default
        raise UserError("--output_dir is needed: the folder for the head, its checkpoints and its provenance.")
    args = TrainArgs(data=data, draft=draft, evaluation=evaluation, trainer=trainer)
    check_ranges(args, separator="_")
    evaluation.tree()
    check_report_to(trainer)
    for server in data.server:
        base_url(server)
    return args


def check_report_to(trainer: TrainerArguments) -> None:
    """Refuse a tracker that is unknown or not installed: the Trainer would, after the target was loaded."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in trainer.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*INTEGRATION_TO_CALLBACK, "none"]
            raise UserError(f"--report_to {name}: unknown{nearest(name, known)}. Known: {', '.join(sorted(known))}.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:  # both are raised where the package is not installed
            raise UserError(
                f"--report_to {name}: it cannot be used here ({' '.join(str(error).split())}). Install it, or give "
                f"--report_to none."
            ) from None


def _with_recipe(argv: list[str], known: Sequence[str]) -> list[str]:
    for index, word in enumerate(argv):
        if word.startswith("--config"):
            inline = word.partition("=")[2]
            if not inline and index + 1 >= len(argv):
                raise UserError("--config needs a YAML file.")
            recipe = read_recipe(Path(inline or argv[index + 1]), known)
            flags: list[str] = []
            for key, value in recipe.items():
                if value is not None:
                    flags += [f"--{key}", *map(_word, value if isinstance(value, list) else [value])]
            return flags + argv[:index] + argv[index + (1 if inline else 2) :]
    return argv


def _word(value: Any) -> str:
    """A value of a recipe as the library parses it; its dictionaries are JSON."""
    return json.dumps(value) if isinstance(value, dict) else str(value)
