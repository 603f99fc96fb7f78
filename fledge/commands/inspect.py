"""`fledge inspect PATH`: look at what a path is, and show it with the module that knows it.

A folder whose manifest.json says hidden_store holds stored hidden states, a folder with config.json is a draft head;
everything else is data (regenerated answers have a manifest, too).
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tyro

from fledge.data.image_urls import allow_image_urls
from fledge.data.settings import PromptSettings, SampleSettings
from fledge.errors import UserError
from fledge.outputs import OverwriteSettings
from fledge.parsing import read_python_json
from fledge.ranges import Count, Natural


@dataclass(frozen=True, kw_only=True)
class InspectArgs(PromptSettings, SampleSettings, OverwriteSettings):
    """What is looked at."""

    path: Annotated[str, tyro.conf.Positional]
    """Data (jsonl, json, parquet, a folder of those, a hub data set name), stored hidden states, or a draft head."""
    target: str | None = None
    """The target: its tokenizer and template render data (needed for data); a head is compared with it and tried."""
    fix: Path | None = None
    """Of a head: write a repaired copy here (what the files prove and what was measured), and say what changed."""
    measure: bool = True
    """Of a head with --target: load the target and measure what the files cannot say (rope, taps, norms)."""
    measure_prompts: Count = 12
    """Built-in prompts the target answers for that; more make smaller differences visible."""
    data: str | None = None
    """Of a head with --target: conversations whose supervised tokens its draft vocabulary should cover."""
    model_max_length: Count | None = None  # type: ignore[assignment]
    """Cut samples to this many tokens. None keeps them whole."""
    sample: Natural = 0
    """Which sample to print first, counted from 0; two more follow it."""
    json: Path | None = None
    """Also write every figure to this file, as JSON."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the target."""


MAIN = (
    "path", "target", "fix", "overwrite", "measure", "measure_prompts", "data", "chat_template_type", "thinking",
    "train_last_turn_only", "model_max_length", "data_format", "split", "sample", "json",
)  # fmt: skip


class ManifestKind(msgspec.Struct):
    """What a folder with a manifest.json is; others' manifests say nothing of the kind."""

    kind: Any = None


def inspect(args: InspectArgs) -> None:
    """Show what is in a data set (as training will see it), a store of hidden states or a draft head."""
    allow_image_urls(args.allow_image_urls)
    folder = Path(args.path).expanduser()
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_python_json(manifest, ManifestKind).kind == "hidden_store":
        _call("fledge.storage.states.inspect", "inspect_store", args, "stored hidden states")
    elif (folder / "config.json").is_file():
        _call("fledge.doctor.inspect_head", "inspect_head", args, "draft heads")
    else:
        inspect_data(args)


def inspect_data(args: InspectArgs) -> None:
    """Tokenise the data with the target's template and print what training would see."""
    from fledge.data.dataset import TokenizedData
    from fledge.data.inspect import SAMPLES_SHOWN, figures, show
    from fledge.data.rows import check_source
    from fledge.data.tokenize import ChatTemplate
    from fledge.outputs import write_figures

    check_source(args.path)
    if args.target is None:
        raise UserError(f"{args.path} is data: give --target MODEL, whose tokenizer and chat template render it.")
    template = ChatTemplate.from_pretrained(
        args.target, args.chat_template_type, enable_thinking=args.enable_thinking,
        trust_remote_code=args.trust_remote_code, min_pixels=args.min_pixels, max_pixels=args.max_pixels,
        last_turn_only=args.train_last_turn_only, untraced=args.untraced,
    )  # fmt: skip
    data = TokenizedData.from_path(
        args.path, template, max_length=args.model_max_length, data_format=args.data_format, split=args.split,
        max_reject_share=args.max_reject_share, num_proc=args.num_proc, columns=args.columns,
        repeated_ids=args.repeated_ids,
    )  # fmt: skip
    if not 0 <= args.sample < len(data):
        raise UserError(f"--sample {args.sample}: the data has samples 0 to {len(data) - 1}.")
    document = figures(data, args.path, args.data_format, args.split, args.columns, args.repeated_ids)
    show(document, [data[index] for index in range(len(data))[args.sample :][:SAMPLES_SHOWN]], template)
    if args.json is not None:
        write_figures(args.json, document, overwrite=args.overwrite)


def _call(module: str, function: str, args: InspectArgs, what: str) -> None:
    """Hand over to the stage that knows this kind of path."""
    try:
        inspect_it = getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise
        raise UserError(f"{args.path}: this version of fledge cannot inspect {what} ({module} is missing).") from None
    inspect_it(args)
