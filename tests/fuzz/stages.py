"""The command line without what comes behind it: good flags of every command, and a stop where real work begins.

`run_stopped` runs a command as a terminal would. Loading a target or a head, opening a store, asking or starting a
server raises `Reached` instead, so a case costs milliseconds, and a flag that is refused later than that counts as
accepted.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Union
from unittest import mock

from fledge.cli import COMMANDS, run_command, sentence
from fledge.config import parse
from fledge.errors import UserError
from fuzz.harness import Reached

# Where real work begins; each raises Reached.
HEAVY = (
    "fledge.target.model.Target.from_pretrained",
    "fledge.target.head.TargetEnds.from_files",
    "fledge.target.store.reader.HiddenStore.__init__",
    "fledge.data.tokenize.ChatTemplate.from_pretrained",
    "fledge.data.local_engine.LocalEngine.__init__",
    "fledge.data.openai_client.OpenAIClient.__aenter__",
    "fledge.export.convert.read_head",
    "fledge.export.convert.read_any",
    "fledge.bench.compare.read_summary",
    "fledge.bench.server.measure_levels",
    "fledge.workers._ray",
    "fledge.target.engine.subprocess.Popen",
    "transformers.AutoConfig.from_pretrained",
)
GOOD: dict[str, tuple[str, str]] = {  # a good value of a flag, and another one
    "top_p": ("0.9", "0.5"), "temperature": ("0.5", "1"), "max_reject_share": ("0.5", "0"), "total_token": ("8", "16"),
    "eval_fraction": ("0.1", "0.2"), "supervised_share": ("0.5", "1"), "depth_survival": ("0.5", "1"),
    "base_port": ("7000", "8000"), "adam_beta1": ("0.8", "0.5"), "adam_beta2": ("0.9", "0.99"),
    "rope_theta": ("10000", "500000"), "max_new_token": ("5", "6"), "weight_decay": ("0.1", "0"),
    "train_efficiency": ("0.5", "0.4"), "target_efficiency": ("0.5", "0.4"), "seed": ("1", "0"),
    "max_tokens": ("16", "32"), "model_max_length": ("256", "512"), "sliding_window": ("16", "32"),
    "optim": ("adamw_torch", "sgd"), "lr_scheduler_type": ("linear", "constant"), "data_format": ("auto", "messages"),
    "target_dtype": ("float32", "auto"), "report_to": ("none", "none"), "draft_type": ("eagle3", "eagle3.1"),
    "tap_storage": ("same", "fp8"), "last_storage": ("all", "supervised"), "hardware": ("h100", "cpu"),
    "eval_decode_tree": ("8 2 3", "16 3 4"), "max_steps": ("1", "2"), "warmup_steps": ("1", "0"),
}  # fmt: skip
# Flags that mean something only together with others, or that choose another way through the command.
TOGETHER = set(
    """
    data_format adaptive api_key_env backend baseline_url bench_dir bench_name chat_template_type concurrency data
    data_shard_size device device_map draft draft_model_config_path dtype eagle_url enable_thinking endpoints engine
    eval_data_path eval_decode_steps eval_hidden_path fix gpu_memory_gb gpus gpus_per_worker host image init_from
    json license license_link license_name local_rank matrix_optim max_gpu_memory max_pixels max_prompt_length
    min_pixels mode model notes num_gpus_per_model num_gpus_total num_servers num_tokens num_workers output
    prepare_only print private profile profile_path push_to_hub question_begin question_end raw report
    resume_from_checkpoint retry_rejects run_code server step_decay tap_layers target target_backend
    tensor_parallel_size tflops to tokenizer tp_plan train_hidden_path tune vllm work_dir
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
    if command == "train":
        from fledge.train.arguments import GROUPS

        flags = [flag for group in GROUPS for flag in _fields(group)]
        return [flag for flag in flags if flag.name in TRAINER or flag.name in _own_names()]
    return [flag for flag in _fields(getattr(_module(command), COMMANDS[command].args)) if flag.name != "vllm_args"]


def _own_names() -> set[str]:
    from fledge.train.arguments import GROUPS

    return {field.name for group in GROUPS[:3] for field in dataclasses.fields(group)}


def _fields(args: Any) -> Iterator[Flag]:
    hints = typing.get_type_hints(args)
    for field in dataclasses.fields(args):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name])
        elif field.init:
            missing = field.default is field.default_factory is dataclasses.MISSING
            yield flag_of(field.name, typing.get_type_hints(args, include_extras=True)[field.name], missing)


def _module(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command].module)


def parse_words(command: str, words: list[str]) -> Any:
    """The flags as the command gets them."""
    module = _module(command)
    parser = getattr(module, "parse_args", parse)
    about = sentence(getattr(module, COMMANDS[command].run))
    with quiet():
        return parser(getattr(module, COMMANDS[command].args), words, prog=f"fledge {command}", description=about)


def run_stopped(command: str, words: list[str]) -> None:
    """Run a command up to where real work begins. Raises UserError with the line that the user sees."""
    with stopped():
        run_through(command, words)


def run_through(command: str, words: list[str]) -> None:
    """Run a command to its end."""
    with quiet() as shown:
        status = run_command(command, words)
    if status:
        errors = [line for line in shown.getvalue().splitlines() if line.startswith("error:")]
        if status not in (1, 2) or len(errors) != 1:
            raise AssertionError(f"status {status} with {len(errors)} lines of error: {shown.getvalue()[-200:]!r}")
        raise UserError(errors[0])


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is shown, instead of showing it; written as UTF-8, as a terminal does."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    kept = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        yield kept
    shown.seek(0)
    kept.write(shown.read())


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Within the block nothing heavy is loaded, asked or started."""

    def stop(*_: Any, **__: Any) -> Any:
        raise Reached

    with contextlib.ExitStack() as stack:
        for name in HEAVY:
            stack.enter_context(mock.patch(name, stop))
        yield


def words_of(flags: dict[str, str], leave_out: str, positional: tuple[str, str] | None = None) -> list[str]:
    words = [positional[1]] if positional and positional[0] != leave_out else []
    for name, value in flags.items():
        words += [f"--{name}", value] if name != leave_out else []
    return words


def written(folder: Path) -> Path:
    """Two conversations."""
    path = folder / "data.jsonl"
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    path.write_text("".join(json.dumps({"id": name, "conversations": turns}) + "\n" for name in "ab"))
    return path


def base(positional: str | None = None, **flags: str) -> Callable[..., list[str]]:
    """Good words of a command in a folder; DATA, OUT and TARGET stand for paths there."""

    def make(folder: Path, leave_out: str) -> list[str]:
        (folder / "target").mkdir(exist_ok=True)
        places = {"DATA": str(written(folder)), "OUT": str(folder / "out"), "TARGET": str(folder / "target")}
        filled = {name: places.get(value, value) for name, value in flags.items()}
        first = (positional.split("=")[0], places[positional.split("=")[1]]) if positional else None
        return words_of(filled, leave_out, first)

    return make


BASE: dict[str, Callable[..., list[str]]] = {
    "serve": base(model_name_or_path="TARGET", vllm="/bin/true"),
    "regenerate": base(data_name_or_path="DATA", output_dir="OUT"),
    "decode": base(target="TARGET", prompt="hello"),
    "chat": base(target="TARGET"),
    "bench": base(base_model_path="TARGET", mode="baseline", bench_name="quick", output_dir="OUT", num_gpus_total="0"),
    "report": base("paths=OUT"),
    "plan": base(target_model_name_or_path="TARGET", num_tokens="1000", hardware="h100"),
    "extract": base(model_name="TARGET", dataset_path="DATA", output_dir="OUT"),
    "train": base(target_model_name_or_path="TARGET", train_data_path="DATA", output_dir="OUT"),
    "export": base("head=OUT", to="vllm", output_dir="OUT"),
    "convert": base("head=OUT", output_dir="OUT"),
    "inspect": base("path=DATA", target="TARGET"),
    "quickstart": base(target="TARGET", work_dir="OUT"),
}
