"""`fledge inspect PATH`: look at what a path is, and show it with the module that knows it.

A folder whose manifest.json says hidden_store holds stored hidden states, a folder with config.json is a draft head;
everything else is data (regenerated answers have a manifest, too).
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from fledge.console import say
from fledge.data.conversations import DataFormat
from fledge.data.image_urls import AllowImageUrls, allow_image_urls
from fledge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    path: Annotated[str, tyro.conf.Positional]
    """Data (jsonl, json, parquet, a folder of those, a hub data set name), stored hidden states, or a draft head."""
    target: str | None = None
    """The target: its tokenizer and template render data (needed for data); a head is compared with it and tried."""
    fix: Path | None = None
    """Of a head: write a repaired copy here (what the files prove and what was measured), and say what changed."""
    measure: bool = True
    """Of a head with --target: load the target and measure what the files cannot say (rope, taps, norms)."""
    measure_prompts: int = 12
    """Built-in prompts the target answers for that; more make smaller differences visible."""
    measure_tokens: int = 64
    """Longest of these answers, in tokens."""
    data: str | None = None
    """Of a head with --target: conversations whose supervised tokens its draft vocabulary should cover."""
    chat_template_type: str | None = None
    """Named chat template instead of the tokenizer's own (qwen3, hunyuan, llama3, gemma, gpt_oss, chatml ...)."""
    enable_thinking: bool | None = None
    """Passed to templates that know thinking modes; use what the data was generated with."""
    model_max_length: int | None = None
    """Cut samples to this many tokens. None keeps them whole."""
    data_format: DataFormat = "auto"
    """Format of the rows."""
    data_split: str = "train"
    """Split of a hub data set."""
    sample: int = 0
    """Which sample to print, counted from 0."""
    max_reject_share: float = 0.05
    """Stop when a larger share of rows is rejected."""
    num_proc: int = 1
    """Processes that tokenise; worth it from about 50,000 rows."""
    json: Path | None = None
    """Also write every figure to this file, as JSON."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the target."""
    max_pixels: int | None = None
    """Vision-language targets: area to which larger pictures are reduced. None: the processor's own."""
    min_pixels: int | None = None
    """Vision-language targets: area to which smaller pictures are enlarged. None: the processor's own."""
    allow_image_urls: AllowImageUrls = False


def inspect(args: InspectArgs) -> None:
    """Show what is in a data set (as training will see it), a store of hidden states or a draft head."""
    allow_image_urls(args.allow_image_urls)
    folder = Path(args.path).expanduser()
    manifest = folder / "manifest.json"
    if manifest.is_file() and _read_json(manifest).get("kind") == "hidden_store":
        _call("fledge.target.store.inspect", "inspect_store", args, "stored hidden states")
    elif (folder / "config.json").is_file():
        _call("fledge.bench.inspect_head", "inspect_head", args, "draft heads")
    else:
        inspect_data(args)


def inspect_data(args: InspectArgs) -> None:
    """Tokenise the data with the target's template and print what training would see."""
    from fledge.data.dataset import TokenizedData
    from fledge.data.inspect import figures, show
    from fledge.data.rows import check_source
    from fledge.data.tokenize import ChatTemplate
    from fledge.provenance import write_json

    check_source(args.path)
    if args.target is None:
        raise UserError(f"{args.path} is data: give --target MODEL, whose tokenizer and chat template render it.")
    template = ChatTemplate.from_pretrained(
        args.target, args.chat_template_type, enable_thinking=args.enable_thinking,
        trust_remote_code=args.trust_remote_code, min_pixels=args.min_pixels, max_pixels=args.max_pixels,
    )  # fmt: skip
    data = TokenizedData.from_path(
        args.path, template, max_length=args.model_max_length, data_format=args.data_format, split=args.data_split,
        max_reject_share=args.max_reject_share, num_proc=args.num_proc,
    )  # fmt: skip
    if not 0 <= args.sample < len(data):
        raise UserError(f"--sample {args.sample}: the data has samples 0 to {len(data) - 1}.")
    document = figures(data, args.path, args.data_format, args.data_split)
    show(document, data[args.sample], template)
    if args.json is not None:
        write_json(args.json, document)
        say(f"figures written to {args.json}")


def _call(module: str, function: str, args: InspectArgs, what: str) -> None:
    """Hand over to the stage that knows this kind of path."""
    try:
        inspect_it = getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise
        raise UserError(f"{args.path}: this version of fledge cannot inspect {what} ({module} is missing).") from None
    inspect_it(args)


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Write it again.") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(document).__name__}.")
    return document
