"""`fledge serve`: the servers of `fledge.servers.processes`, with the head looked at first.

vLLM loads a wrong head without a word and drafts nothing with it, or crashes a minute into its start. Everything that
can be seen in the head's files is refused before a server starts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from fledge.commands import parser
from fledge.console import warn
from fledge.errors import UserError, refuse_missing_folder
from fledge.servers.processes import ServerSettings, keep_running, plan, visible_gpus


@dataclass(frozen=True, kw_only=True)
class ServeArgs(ServerSettings):
    """Servers of one target."""

    print: bool = False
    """Show the commands and start nothing."""
    vllm_args: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()


def parse_args(args_class: type[ServeArgs], argv: Sequence[str], *, prog: str, description: str = "") -> ServeArgs:
    """Everything after `--` belongs to vLLM."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse(args_class, words[:cut], prog=prog, description=description)
    return replace(args, vllm_args=(*args.vllm_args, *words[cut + 1 :]))


def serve(args: ServeArgs) -> None:
    """Start one vLLM server per GPU group and keep them running. Arguments after `--` go to vLLM as they are."""
    gpus = visible_gpus(args.gpus)
    if args.draft:
        from fledge.export.servable import check_draft

        check_draft(args.draft, args.target, args.num_speculative_tokens)
        if not gpus:
            warn(
                "vLLM's CPU build (0.32.0) answers nonsense above temperature 0 as soon as it drafts, with any head: "
                "ask at temperature 0, or serve without --draft (docs/vllm-on-cpu.md)."
            )
    servers = plan(args, gpus)
    if args.print:
        for server in servers:
            print(server.shell_line())
        return
    refuse_missing_model(args.target)
    keep_running(args, servers)


def refuse_missing_model(name: str) -> None:
    """vLLM ends with a long traceback in its log where there is no such model."""
    refuse_missing_folder(name)
    if Path(name).exists() or "VLLM_USE_MODELSCOPE" in os.environ or ":" in name:
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        hf_hub_download(name, "config.json")
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: no folder here, and its config.json cannot be had from the hub ({type(error).__name__}). Check "
            f"the path or the name, and the login where the model is gated."
        ) from None
