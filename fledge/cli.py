"""`fledge COMMAND`: parse flags into the command's dataclass, call its function, turn user errors into one line.

Commands are named by module path and imported only when asked for, so `fledge --help` answers at once.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import fledge
from fledge.console import console, show_error
from fledge.cores import wait_asleep_beside_others
from fledge.errors import UserError, explained, nearest

INTERRUPTED = 130  # exit status, as shells have it

# Whose own exception types speak of files, templates and the network. Errors are named where a file is read; this is
# the last net for what a library reads behind our back.
LIBRARIES = {"safetensors", "jinja2", "pyarrow", "yaml", "huggingface_hub"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command lives: `module` has the dataclass `args` and the function `run`, which takes it."""

    module: str
    args: str
    run: str
    help: str
    loads_target: bool = True
    """False: its --target is a name only."""
    computes: bool = True
    """False: no model runs in this process."""
    kept: str = ""
    """What Ctrl-C leaves, where there is something and the command does not say it itself."""


COMMANDS: dict[str, Command] = {
    "serve": Command(
        "fledge.commands.serve", "ServeArgs", "serve", "start vLLM servers, one per GPU group", computes=False
    ),
    "regenerate": Command(
        "fledge.commands.regenerate",
        "RegenerateArgs",
        "regenerate",
        "let the target answer every conversation again",
        kept="finished answers are kept and the same command continues; answers under way are asked again",
    ),
    "decode": Command("fledge.commands.decode", "DecodeArgs", "decode", "answer a prompt with a draft head"),
    "chat": Command("fledge.commands.chat", "AnswerArgs", "chat", "talk to the target with a draft head"),
    "bench": Command("fledge.commands.bench", "BenchArgs", "bench", "measure plain against speculative decoding"),
    "report": Command(
        "fledge.commands.report",
        "ReportArgs",
        "report",
        "draw a benchmark report again, or compare several",
        computes=False,
    ),
    "plan": Command(
        "fledge.commands.plan", "PlanArgs", "plan", "what a training run will need: memory, disk, hours", computes=False
    ),
    "extract": Command(
        "fledge.commands.extract",
        "ExtractArgs",
        "extract",
        "store the target's hidden states",
        kept="finished shards are kept and the same command continues; the shard under way is made again",
    ),
    "train": Command("fledge.commands.train", "TrainArgs", "train", "train a draft head, online or from stored states"),
    "export": Command(
        "fledge.commands.export",
        "ExportArgs",
        "export_head",
        "write a head as vLLM or SGLang read it",
        loads_target=False,
        computes=False,
    ),
    "convert": Command(
        "fledge.commands.convert", "ConvertArgs", "convert_head", "bring another trainer's head here", computes=False
    ),
    "inspect": Command(
        "fledge.commands.inspect", "InspectArgs", "inspect", "look into data, stored hidden states or a head"
    ),
    "doctor": Command(
        "fledge.commands.doctor", "DoctorArgs", "doctor", "check this machine: packages, GPU, disk, hub", computes=False
    ),
    "quickstart": Command(
        "fledge.commands.quickstart",
        "QuickstartArgs",
        "quickstart",
        "the whole path on a small real model",
        kept="finished steps are kept and the same command continues",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 it worked, 1 an error, 2 wrong flags, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not console.is_interactive:
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which fill a log with their redrawings
    if not words or words[0] in ("-h", "--help", "help"):
        show(usage())
        sys.exit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"fledge {fledge.__version__}")
        return
    if words[0] not in COMMANDS:
        print(f"fledge: unknown command {words[0]!r}{nearest(words[0], COMMANDS)}.\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_command(words[0], words[1:]))


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    from fledge.commands.help import asks_for_help
    from fledge.commands.parser import parse, with_model_folder

    command = COMMANDS[name]
    status = 2  # until the flags are known to be right
    try:
        module = importlib.import_module(command.module)
        if (asked := asks_for_help(argv)) is not None:
            show(help_text(name, module, everything=asked == "--help-all"))
            return 0
        if command.computes:
            wait_asleep_beside_others()
        args_class = getattr(module, command.args)
        parser = getattr(module, "parse_args", parse)  # `train` adds the Trainer's own arguments
        args = parser(args_class, argv, prog=f"fledge {name}", description=sentence(getattr(module, command.run)))
        status = 1
        getattr(module, command.run)(with_model_folder(args) if command.loads_target else args)
    except Exception as error:
        message = one_line(error)
        if message is None or os.environ.get("FLEDGE_TRACEBACK"):
            raise
        show_error(message)
        return status
    except KeyboardInterrupt:
        console.print("interrupted" + (f": {command.kept}" if command.kept else ""), style="bold red")
        return INTERRUPTED
    return 0


def show(text: str) -> None:
    """Print to a reader that may have enough, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(name: str, module: ModuleType, *, everything: bool) -> str:
    """What a command's `--help` or `--help-all` shows."""
    from fledge.commands.help import full_help, short_help

    command = COMMANDS[name]
    prog, about = f"fledge {name}", sentence(getattr(module, command.run))
    if everything:
        others = module.other_flags() if hasattr(module, "other_flags") else ()
        return full_help(prog, about, getattr(module, command.args), others)
    args_class = getattr(module, "HelpArgs", getattr(module, command.args))
    return short_help(prog, about, args_class, getattr(module, "MAIN", ()))


def one_line(error: Exception) -> str | None:
    """What a user is told of an error; None for one that only we can fix, which keeps its traceback."""
    message = " ".join((explained(error) if isinstance(error, OSError) else str(error)).split())
    if isinstance(error, (UserError, OSError)):
        return message
    library = type(error).__module__.partition(".")[0]
    return f"{type(error).__name__}: {message}" if library in LIBRARIES else None


def sentence(function) -> str:
    """The docstring of a command's function, as its help text."""
    return (function.__doc__ or "").strip()


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    what = "Draft heads (EAGLE-3, DFlash, DSpark), from conversations to an honest speed-up."
    return "\n".join(
        ["usage: fledge COMMAND [flags]", "", what, "", "commands:", *lines, ""]
        + ["`fledge COMMAND --help` explains its flags, `--help-all` every one; `--config recipe.yaml` reads them."]
        + ["FLEDGE_TRACEBACK=1 shows the traceback behind an error."]
    )


if __name__ == "__main__":
    main()
