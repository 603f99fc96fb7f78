"""Heads to and from other programs' layouts.

The round trip is the identity on tensors; an unknown or missing tensor is an error that lists it. How a layout is
written is a row in `layouts`, how another trainer's head is read a row in `fledge.drafters.eagle3.foreign`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fledge import provenance
from fledge.console import say
from fledge.drafters.dspark.foreign import block_origin_of, read_any_block
from fledge.drafters.eagle3.checkpoint import WEIGHTS, same_embedding
from fledge.drafters.eagle3.foreign import origin_of, read_any, read_config
from fledge.drafters.eagle3.head import EMBEDDING, Head
from fledge.drafters.layer_config import HINT, JSON
from fledge.errors import UserError, naming
from fledge.export.block_layouts import BLOCK_LAYOUTS
from fledge.export.card import CARD, model_card
from fledge.export.forms import AnyHead, AnyLayout, form_of
from fledge.export.hub import push_folder
from fledge.export.layouts import LAYOUTS
from fledge.export.settings import ConvertSettings, ExportSettings
from fledge.outputs import Output, check, document_has, write_file, write_json, written
from fledge.parsing import read_json
from fledge.target.head import TargetEnds

HEAD_FILES = ("config.json", WEIGHTS)
EXPORT = Output(
    "export", (*HEAD_FILES, CARD, "export.json"), lambda folder: document_has(folder / "export.json", "source")
)
CONVERT = Output(
    "convert", (*HEAD_FILES, "convert.json"), lambda folder: document_has(folder / "convert.json", "origin")
)


def write_head(head: AnyHead, folder: Path, layout: AnyLayout, target: str) -> None:
    """Write a head in a layout into a folder that is being built (`fledge.outputs.written`)."""
    layout.refuse(head)
    dtype = str(head.dtype).removeprefix("torch.")
    write_json(folder / "config.json", layout.describe(head.config, dtype, target))
    renamed = {layout.tensor_name(name): tensor.contiguous() for name, tensor in head.tensors.items()}
    with naming(folder / WEIGHTS, needed_bytes=sum(tensor.nbytes for tensor in renamed.values())):
        save_file(renamed, str(folder / WEIGHTS), metadata={"format": "pt"})


def export_head(args: ExportSettings) -> None:
    """Write a head in the layout an engine reads, with its model card, and print the command that serves it."""
    _check_output(args.head, args.output_dir, EXPORT, args.overwrite)
    form = form_of(Path(args.head))
    head, layout = form.read(Path(args.head)), form.layout(args.to)
    if args.to == "speculators" and not args.target:
        raise UserError("--target is needed for --to speculators: its config names the target.")
    card = model_card(
        head.config, Path(args.head), args.output_dir.name, layout=args.to, target=args.target, licence=args.license,
        report=args.report, notes=args.notes,
    )  # fmt: skip
    layout.refuse(head)
    with written(args.output_dir, EXPORT, overwrite=args.overwrite) as folder:
        write_head(head, folder, layout, args.target)
        provenance.write(folder / "export.json", dataclasses.asdict(args), source=args.head)
        write_file(folder / CARD, card)
    say(f"written: {args.output_dir} (model card: README.md)")
    say(layout.command(head.config).replace("TARGET", args.target or "TARGET").replace("HEAD", str(args.output_dir)))
    if args.push_to_hub:
        say(f"uploaded: {push_folder(args.output_dir, args.push_to_hub, private=args.private)}")


def convert_head(args: ConvertSettings) -> None:
    """Bring another trainer's head into fledge's form, so that it can be measured, continued and exported."""
    _check_output(args.head, args.output_dir, CONVERT, args.overwrite)
    head, origin, layout = _read_foreign(Path(args.head), args)
    if args.rope_theta:
        rope = {**head.config.rope_parameters, "rope_theta": args.rope_theta}
        head = dataclasses.replace(head, config=dataclasses.replace(head.config, rope_parameters=rope))
    described = layout.describe(head.config, str(head.dtype).removeprefix("torch."), args.target or "")
    with written(args.output_dir, CONVERT, overwrite=args.overwrite) as building:
        write_head(head, building, layout, args.target or "")
        provenance.write(building / "convert.json", dataclasses.asdict(args), origin=origin, head=described)
    say(f"written: {args.output_dir} (from {origin}); taps are inputs of layers {list(head.config.tap_layers)}")


def _read_foreign(folder: Path, args: ConvertSettings) -> tuple[Any, str, AnyLayout]:
    """A head in any layout, its trainer's name, and the layout that is fledge's own form of it."""
    block = block_origin_of(read_json(folder / "config.json", JSON, hint=HINT))
    if block is not None:
        return read_any_block(folder), block.name, BLOCK_LAYOUTS["vllm"]
    num_layers = None
    if args.target:
        from transformers import AutoConfig

        num_layers = AutoConfig.from_pretrained(args.target).get_text_config().num_hidden_layers
    head = read_any(folder, num_target_layers=num_layers, tap_convention=args.tap_convention)
    return _without_copies(head, folder, args.target), origin_of(read_config(folder)).name, LAYOUTS["eagle"]


def _without_copies(head: Head, folder: Path, target: str | None) -> Head:
    """The head without an embedding that is only a copy of its target's."""
    if EMBEDDING not in head.tensors:
        return head
    if target is None:
        say(f"{folder} brings a token embedding, which is kept; with --target a mere copy of the target's is left out")
        return head
    if not same_embedding(head.tensors[EMBEDDING], TargetEnds.from_files(target).head.embedding):
        say(f"{folder} brings a token embedding of its own, which is kept")
        return head
    tensors = {name: tensor for name, tensor in head.tensors.items() if name != EMBEDDING}
    return dataclasses.replace(head, tensors=tensors)


def _check_output(head: str, folder: Path, output: Output, overwrite: bool) -> None:
    """Refuse to write into folders of others, and over the head that is read."""
    check(folder, output, overwrite=overwrite)
    if not overwrite and folder.exists() and Path(head).exists() and folder.samefile(head):
        raise UserError(
            f"{folder}: is the head that is read, and would be replaced. Choose another --output-dir, or give "
            f"--overwrite to have it replaced."
        )
