"""The flags of every command as the fuzzer sees them, read from the commands' own dataclasses."""

import dataclasses
import functools
import importlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Union

from fledge.cli import COMMANDS

GOOD: dict[str, tuple[str, str]] = {  # a good value of a flag, and another one
    "top_p": ("0.9", "0.5"), "min_p": ("0.1", "0.5"),
    "temperature": ("0.5", "1"), "max_reject_share": ("0.5", "0"), "total_token": ("8", "16"),
    "eval_fraction": ("0.1", "0.2"), "depth_survival": ("0.5", "1"),
    "base_port": ("7000", "8000"), "adam_beta1": ("0.8", "0.5"), "adam_beta2": ("0.9", "0.99"),
    "rope_theta": ("10000", "500000"), "max_new_tokens": ("5", "6"), "weight_decay": ("0.1", "0"),
    "seed": ("1", "0"),
    "model_max_length": ("256", "512"),
    "optim": ("adamw_torch", "sgd"), "lr_scheduler_type": ("linear", "constant"), "data_format": ("auto", "messages"),
    "target_dtype": ("float32", "auto"), "logging_steps": ("2", "4"), "save_steps": ("2", "4"),
    "warmup_ratio": ("0.1", "0.2"), "draft_type": ("eagle3", "eagle3.1"),
    "tap_storage": ("same", "fp8"), "last_storage": ("all", "supervised"), "hardware": ("h100", "h200"),
    "max_steps": ("1", "2"),
    "save_strategy": ("steps", "epoch"), "logging_strategy": ("steps", "epoch"), "eval_strategy": ("no", "no"),
    "warmup_steps": ("1", "0"),
}  # fmt: skip
# Flags that mean something only together with others, or that choose another way through the command.
TOGETHER = set(
    """
    data_format adaptive api_key_env backend baseline_url bench_dir bench_name chat_template_type columns concurrency
    data data_shard_size device device_map draft draft_config dtype eagle_url engine
    eval_data eval_decode_steps eval_states fix gpu_memory_gb gpus host image init_from
    json license local_rank matrix_optim max_gpu_memory max_pixels max_prompt_length
    min_pixels mode model notes num_gpus_per_model num_gpus_total num_servers num_tokens num_workers output own_prompts
    prepare_only print private profile profile_path push_to_hub question_begin question_end raw report report_to
    resume_from_checkpoint retry_rejects run_code server tap_layers target target_backend
    tensor_parallel_size tflops to tokenizer tp_plan states tune vllm
    """.split()
)
# Of transformers' TrainingArguments: those whose ranges are checked here.
TRAINER = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "logging_steps", "report_to", "eval_strategy",
    "save_strategy", "save_steps", "seed", "dataloader_num_workers", "bf16", "resume_from_checkpoint", "matrix_optim",
    "warmup_ratio", "logging_strategy", "run_name", "save_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """A flag as the fuzzer sees it."""

    name: str
    kind: type
    several: bool
    optional: bool
    required: bool
    choices: tuple[str, ...]
    good: str | None
    other: str | None

    def words(self, value: str | None) -> list[str]:
        """The flag with a value, as words."""
        if self.kind is bool:
            return [f"--{self.name}"]
        return [f"--{self.name}", *(str(value).split(" ") if self.several else [str(value)])]

    def parsed(self, value: str | None) -> Any:
        """The value as the command should have it."""
        if self.kind is bool:
            return True
        if self.several:
            return [self.kind(word) for word in str(value).split(" ")]
        return value if self.choices else self.kind(value)


def flag_of(name: str, annotation: Any, required: bool) -> Flag:
    kind, several, optional, choices = _kind(annotation)
    simple = {int: ("3", "4"), float: ("1.5", "2.5"), str: ("text", "é ü"), Path: ("some/path", "other"),
              bool: ("", "")}  # fmt: skip
    good, other = GOOD.get(name, simple.get(kind, (None, None)))
    if choices:
        good, other = choices[0], choices[-1]
    if name in TOGETHER or required:
        good = other = None
    return Flag(name, kind, several, optional, required, choices, good, other)


def _kind(annotation: Any) -> tuple[type, bool, bool, tuple[str, ...]]:
    """(type of a value, several, may be None, choices)."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return str, False, False, tuple(map(str, inner))
    if origin in (list, tuple):
        kind, _, _, choices = _kind(inner[0])
        return kind, True, False, choices
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        some = [part for part in inner if part is not type(None)]
        kind, several, _, choices = _kind(some[0])
        return kind, several, len(some) < len(inner), choices
    return (annotation if annotation in (int, float, str, bool, Path) else str), False, False, ()


@functools.cache
def flags_of(command: str) -> list[Flag]:
    """Every flag of a command that the fuzzer knows how to break."""
    flags = [flag for flag in _fields(getattr(module_of(command), COMMANDS[command].args)) if flag.name != "vllm_args"]
    if command == "train":
        from fledge.train.arguments import TrainerArguments

        flags += [flag for flag in _fields(TrainerArguments) if flag.name in TRAINER]
    return flags


def _fields(args: Any) -> Iterator[Flag]:
    hints = typing.get_type_hints(args)
    for field in dataclasses.fields(args):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name])
        elif field.init:
            missing = field.default is field.default_factory is dataclasses.MISSING
            yield flag_of(field.name, typing.get_type_hints(args, include_extras=True)[field.name], missing)


def module_of(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command].module)
