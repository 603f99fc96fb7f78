"""The Trainer's arguments under their own names, with this job's defaults, and everything a training run is told."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from fledge.console import say
from fledge.drafters.loss import LossSettings
from fledge.errors import UserError, nearest
from fledge.ranges import Count, Natural, NotNegative, PartialShare, Positive, Seed, Share, Whole
from fledge.target.linear import multiplies_bf16
from fledge.train.settings import DraftSettings, EvaluationSettings, InputSettings


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainerArguments(TrainingArguments):
    """transformers' TrainingArguments with this job's defaults; every other default is the library's."""

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
    overwrite: bool = _flag(
        False,
        "Replace what lies in the output folder under names that this command writes, though "
        "it did not write them. An earlier run there that is not continued is deleted.",
    )
    per_device_train_batch_size: Count = _flag(4, "Sequences per device and forward pass; never padded.")
    per_device_eval_batch_size: Count = _flag(4, "Sequences per device and evaluation pass.")
    learning_rate: NotNegative | None = _flag(  # type: ignore[assignment]
        None, "Peak rate. None: 0.4 / hidden size, at most 1e-3 (1e-4 at 4096)."
    )
    lr_scheduler_type: str = _flag("cosine", "Schedule after warm-up.")
    warmup_ratio: Share | None = _flag(0.03, "Share of the steps spent warming up, unless --warmup_steps is given.")
    warmup_steps: NotNegative | None = _flag(  # type: ignore[assignment]
        None, "Steps spent warming up; below 1, a share of them. None: --warmup_ratio."
    )
    adam_beta2: PartialShare = _flag(0.95, "Second AdamW beta.")
    matrix_optim: Literal["auto", "muon", "same"] = _flag(
        "auto", "muon: the draft's matrices (not lm_head) by Muon, the rest by --optim. same: all by --optim. auto: "
        "muon where the head is whole on every process, same under FSDP and DeepSpeed."
    )  # fmt: skip
    max_grad_norm: NotNegative = _flag(0.5, "Gradient clipping.")
    bf16: bool = _flag(
        True, "bfloat16 mixed precision with fp32 master weights; fp32 on a processor without products of bfloat16."
    )
    logging_steps: NotNegative = _flag(10, "Steps between log lines.")
    verbose: bool = _flag(False, "Print the draft's config, and every metric at each log step.")
    save_total_limit: Natural | None = _flag(2, "Checkpoints kept for resuming.")
    report_to: str | None = _flag("none", "wandb, tensorboard, trackio, ... (several: a,b), or none.")
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
        if self.bf16 and self.use_cpu and not multiplies_bf16():
            self.bf16 = False
            say("training in fp32: this processor has no products of bf16, which would take many times as long")
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio or 0.0  # below 1, the library reads it as a share
        if self.report_to and "," in self.report_to:
            self.report_to = [name.strip() for name in self.report_to.split(",")]  # type: ignore[assignment]
        if self.activation_checkpointing and not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = True  # the name before transformers had this one
        super().__post_init__()


@dataclass(kw_only=True)
class TrainSettings:
    """All of it."""

    inputs: InputSettings
    draft: DraftSettings
    evaluation: EvaluationSettings
    trainer: TrainerArguments

    def loss_settings(self) -> LossSettings:
        return LossSettings(position_weights=self.draft.position_weights, average=self.draft.loss_average)

    def resolved(self) -> dict[str, Any]:
        """Every field as written beside the head; running from this file repeats the run."""
        ours: list[Any] = [self.inputs, self.draft, self.evaluation]
        parts = [*(dataclasses.asdict(part) for part in ours), self.trainer.to_dict()]
        return {key: value for part in parts for key, value in part.items()}


def check_report_to(trainer: TrainerArguments) -> None:
    """Refuse a tracker that is unknown or not installed: the Trainer would, after the target was loaded. A name that no
    tracker is given is told."""
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
    if trainer.run_name and not trainer.report_to:
        say(f"--run_name {trainer.run_name} names the run in a tracker, and none is asked for (--report_to)")
