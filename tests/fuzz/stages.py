"""The command line without what comes behind it: good flags of every command, and a stop where real work begins.

`run_stopped` runs a command as a terminal would. Loading a target or a head, opening a store, asking or starting a
server raises `Reached` instead, so a case costs milliseconds, and a flag that is refused later than that counts as
accepted.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fledge.cli import COMMANDS, run_command, sentence
from fledge.commands.parser import parse
from fledge.errors import UserError
from fuzz.flag_kinds import module_of
from fuzz.harness import Reached

# Where real work begins; each raises Reached.
HEAVY = (
    "fledge.target.model.Target.from_pretrained",
    "fledge.target.head.TargetEnds.from_files",
    "fledge.storage.states.reader.HiddenStore.__init__",
    "fledge.data.tokenize.ChatTemplate.from_pretrained",
    "fledge.regeneration.local_engine.LocalEngine.__init__",
    "fledge.regeneration.openai_client.OpenAIClient.__aenter__",
    "fledge.export.convert.form_of",
    "fledge.export.convert._read_foreign",
    "fledge.bench.compare.read_summary",
    "fledge.bench.server.measure_levels",
    "fledge.workers._ray",
    "fledge.servers.processes.subprocess.Popen",
    "transformers.AutoConfig.from_pretrained",
)


def parse_words(command: str, words: list[str]) -> Any:
    """The flags as the command gets them."""
    module = module_of(command)
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
    "serve": base(target="TARGET", vllm="/bin/true"),
    "regenerate": base(data="DATA", output_dir="OUT"),
    "decode": base(target="TARGET", prompt="hello"),
    "chat": base(target="TARGET"),
    "bench": base(target="TARGET", mode="baseline", bench_name="quick", output_dir="OUT", num_gpus_total="0"),
    "report": base("paths=OUT"),
    "plan": base(target="TARGET", num_tokens="1000", hardware="h100"),
    "extract": base(target="TARGET", data="DATA", output_dir="OUT"),
    "train": base(target="TARGET", train_data_path="DATA", output_dir="OUT"),
    "export": base("head=OUT", to="vllm", output_dir="OUT"),
    "convert": base("head=OUT", output_dir="OUT"),
    "inspect": base("path=DATA", target="TARGET"),
    "quickstart": base(target="TARGET", output_dir="OUT"),
}
