"""Every flag of every command: types, ranges, choices, names, repetition; and recipes, which say the same in YAML.

A command is run with good flags and one that is broken. Where it would load a target, a head or data, ask a server or
start one, it is stopped (`stages.stopped`): a flag whose fault can be seen must be refused before that.
"""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.flag_kinds import Flag, flags_of
from fuzz.harness import Case, WrongValue
from fuzz.stages import BASE, parse_words, run_stopped

AREA = "flags"
NO_INT = ("x", "", " ", "1.5", "1e3", "nan", "inf", "0x10", "1,000", "½", "--", "9" * 5000, "True", "[1]")
NO_FLOAT = ("x", "", " ", "1,5", "--", "1.5.2", "½", "True", "1" * 100_000 + "x", "[1]")
NO_CHOICE = ("nonsense", "", " ", "AUTO!", "x" * 100_000, "é", "0")
NO_BOOL = ("maybe", "2", "", "nonsense")
NO_NUMBER = ("nan", "inf", "-inf")
NEGATIVE = ("-1", "-1000000")

# What a number may not be, by flag; the same in every command that has it.
SIZES = """
    max_samples num_proc model_max_length measure_prompts max_pixels min_pixels num_threads
    max_clients concurrency max_attempts max_prompt_length data_shard_size batch_size max_new_tokens
    top_k repeats num_workers num_gpus_per_model per_device_train_batch_size
    per_device_eval_batch_size ttt_steps num_tokens num_servers tensor_parallel_size max_model_len
    num_speculative_tokens gradient_accumulation_steps
    eval_decode_prompts
""".split()
COUNTS = """
    depth sample_top_k samples draft_vocab_size batch_tokens sample eval_decode_steps dataloader_num_workers
    num_gpus_total warmup_steps
""".split()
SHARES = "max_reject_share eval_fraction depth_survival".split()
NOT_NEGATIVE = "weight_decay learning_rate adam_epsilon".split()
POSITIVE = """
    request_timeout_s shard_mb gpu_memory_gb tflops num_train_epochs rope_theta
""".split()
RANGES: dict[str, tuple[str, ...]] = {
    **{name: ("0", *NEGATIVE) for name in SIZES},
    **{name: NEGATIVE for name in COUNTS},
    **{name: ("-0.1", "1.5", "2", *NO_NUMBER) for name in SHARES},
    **{name: ("-1", "-0.001", *NO_NUMBER) for name in NOT_NEGATIVE},
    **{name: ("0", "-1", *NO_NUMBER) for name in POSITIVE},
    "top_p": ("0", "-0.1", "1.01", *NO_NUMBER),
    "temperature": ("-0.1", "-1", *NO_NUMBER),
    "total_token": ("0", "1", "-1"),
    "base_port": ("0", "-1", "65536", "1000000"),
    "adam_beta1": ("-0.1", "1.0", "2", *NO_NUMBER),
    "adam_beta2": ("-0.1", "1.0", "2", *NO_NUMBER),
    "tap_layers": ("-1",),
    "max_grad_norm": ("-1", "nan"),
}
# By command, where the same name means something else.
OTHER_RANGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("extract", "num_gpus_per_model"): NEGATIVE,
    ("plan", "num_gpus_total"): ("0", *NEGATIVE),
    ("quickstart", "question_end"): ("0", *NEGATIVE),
    ("plan", "sample"): ("0", *NEGATIVE),
    ("regenerate", "temperature"): ("-0.1", "nan", "inf", "x", "", "0.5:", ":1", "0.5:-1", "0.0:0.3,0.7", "0:nan"),
    ("train", "optim"): ("nonsense", ""),
    ("train", "lr_scheduler_type"): ("nonsense", ""),
    ("train", "report_to"): ("nonsense", "wandb"),
    ("train", "data_format"): ("nonsense", ""),
    ("train", "logging_strategy"): ("nonsense",),
    ("train", "save_strategy"): ("nonsense",),
    ("train", "eval_strategy"): ("nonsense",),
    ("train", "matrix_optim"): ("nonsense",),
    ("plan", "draft_type"): ("nonsense", ""),
    ("plan", "tap_storage"): ("nonsense", ""),
    ("plan", "last_storage"): ("nonsense", ""),
    ("plan", "hardware"): ("nonsense", ""),
    ("bench", "max_gpu_memory"): ("nonsense", "-1GiB", ""),
    ("regenerate", "server"): ("", " ", "ftp://host:1", "http://", "host:99999", "http://[::1"),
    ("train", "server"): ("", "ftp://host"),
    ("bench", "baseline_url"): ("", "ftp://host:1", "host:99999"),
    ("bench", "eagle_url"): ("", "ftp://host:1", "host:99999"),
    ("regenerate", "api_key_env"): ("NO_SUCH_VARIABLE", ""),
    ("bench", "api_key_env"): ("NO_SUCH_VARIABLE", ""),
    ("serve", "host"): ("", " "),
    ("serve", "gpus"): ("x", "-1", "0,0", ","),
}
# Flags of `fledge bench` that count only when it measures servers.
OF_SERVERS = ("baseline_url", "eagle_url", "api_key_env", "concurrency", "num_speculative_tokens")
TAKES_MORE = ("decode", "report")  # their words end in a list
WITH_SERVERS = ["--backend", "server", "--mode", "both", "--eagle_url", "http://127.0.0.1:1", "--baseline_url",
                "http://127.0.0.1:1"]  # fmt: skip


def wrong_values(command: str, flag: Flag) -> list[tuple[str, tuple[str, ...]]]:
    """(rule, words) of what this flag may not be given."""
    kind = {int: NO_INT, float: NO_FLOAT, bool: NO_BOOL}.get(flag.kind, ())
    values = [*kind, *(NO_CHOICE if flag.choices else ())]
    values = [value for value in values if value not in flag.choices]
    values += OTHER_RANGES.get((command, flag.name), RANGES.get(flag.name, ()) if flag.kind in (int, float) else ())
    found = [(f"--{flag.name} {short(value)}", (f"--{flag.name}={value}",) if flag.kind is bool else
              (f"--{flag.name}", *(value.split(" ") if flag.several else [value]))) for value in values]  # fmt: skip
    if flag.several:
        found = [(rule, words) for rule, words in found if "--" not in words[1:]]
    elif flag.kind is not bool:
        found.append((f"--{flag.name} without a value", (f"--{flag.name}",)))
    if flag.required and flag.kind in (str, Path) and flag.name != "prompt":
        found.append((f"--{flag.name} is empty", (f"--{flag.name}", "")))
    return found


def short(text: str) -> str:
    return repr(text) if len(text) < 20 else f"{text[:8]}... ({len(text)} characters)"


def wrong_names(command: str, flag: Flag) -> list[tuple[str, tuple[str, ...]]]:
    name, value = flag.name, () if flag.kind is bool else (flag.good,)
    return [
        ("misspelt flag", (f"--{name[:-1]}{'x' if name[-1] != 'x' else 'y'}", *value)),
        ("flag cut short", (f"--{name[:-1]}", *value)),
        ("flag with one dash", (f"-{name}", *value)),
        ("flag in capitals", (f"--{name.upper()}", *value)),
        ("unknown flag", ("--no-such-flag", "1")),
        ("flag in Greek letters", ("--δοκιμή", "1")),
        ("an endless flag", ("--" + "x" * 100_000, "1")),
        *([] if command in TAKES_MORE else [("a word too many", ("surplus",))]),
    ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A command's good flags, with one that is right, wrong, or of a name that it does not know."""
    command = draw(st.sampled_from(list(BASE)))
    flag = draw(st.sampled_from(flags_of(command)))
    kind = draw(st.sampled_from(["valid", "valid", "value", "value", "value", "value", "name"]))
    if kind == "valid" and flag.good is not None:
        return valid(command, flag, twice=draw(st.booleans()))
    choices = wrong_names(command, flag) if kind == "name" and flag.good is not None else wrong_values(command, flag)
    if not choices:
        return valid(command, None, twice=False)
    rule, words = draw(st.sampled_from(choices))

    def act(folder: Path) -> None:
        more = WITH_SERVERS if command == "bench" and flag.name in OF_SERVERS else []
        run_stopped(command, [*more, *BASE[command](folder, leave_out=flag.name), *words])

    return Case(AREA, f"{command} {rule}", act, shown=f"fledge {command} ... {' '.join(words)[:120]}")


def valid(command: str, flag: Flag | None, *, twice: bool) -> Case:
    """A good value is taken as it is; of two the last counts."""

    def act(folder: Path) -> None:
        words = BASE[command](folder, leave_out=flag.name if flag else "")
        if flag is None:
            return run_stopped(command, words)
        first, second = flag.words(flag.good), flag.words(flag.other if twice and flag.other else flag.good)
        args = parse_words(command, [*words, *(first if twice and not flag.several else ()), *second])
        found, wanted = value_of(args, flag.name), flag.parsed(flag.other if twice and flag.other else flag.good)
        if (list(found) if flag.several else found) != wanted:
            raise WrongValue(f"--{flag.name} is {found!r}, not {wanted!r}")
        return run_stopped(command, [*words, *second])

    shown = f"fledge {command} ... {' '.join(flag.words(flag.good)) if flag else ''}"
    return Case(AREA, None, act, shown=shown)


def value_of(args: Any, name: str) -> Any:
    """A field of nested dataclasses, by its own name."""
    if hasattr(args, name):
        return getattr(args, name)
    for part in vars(args).values():
        if hasattr(part, "__dataclass_fields__") and (found := value_of(part, name)) is not None:
            return found
    return None
