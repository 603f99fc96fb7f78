"""`fledge serve`: the servers of `fledge.target.engine`, with the head looked at first.

vLLM loads a wrong head without a word and drafts nothing with it, or crashes a minute into its start. Everything that
can be seen in the head's files is refused before a server starts.
"""

import re
from pathlib import Path
from typing import Any

from fledge.console import say, warn
from fledge.errors import UserError
from fledge.export.engines import VLLM, check_servable
from fledge.target import engine
from fledge.target.engine import ServeArgs, parse_args

__all__ = ["ServeArgs", "check_draft", "parse_args", "serve"]


def serve(args: ServeArgs) -> None:
    """Start one vLLM server per GPU group and keep them running. Arguments after `--` go to vLLM as they are."""
    if args.draft:
        check_draft(args.draft, args.model_name_or_path)
        if not engine.visible_gpus(args.gpus):
            warn(
                "vLLM's CPU build (0.32.0) answers nonsense above temperature 0 as soon as it drafts, with any head: "
                "ask at temperature 0, or serve without --draft (docs/vllm-on-cpu.md)."
            )
    engine.serve(args)


def check_draft(draft: str, target: str) -> None:
    """Refuse a head that vLLM could not draft with. A hub name is left to vLLM: its files are not here yet."""
    folder = Path(draft).expanduser()
    if not folder.is_dir():
        if not re.match(r"^[\w.-]+/[\w.-]+$", draft) or folder.exists():
            raise UserError(f"--draft {draft}: no such folder, and no hub name either (those read NAME/HEAD).")
        say(f"{draft} is a hub name: vLLM downloads it, and it is not checked here")
        return
    check_servable(folder, VLLM, _local_text_config(target))


def _local_text_config(target: str) -> Any | None:
    """The target's text config when its files are here; a hub name would mean a download before vLLM's own."""
    if not (Path(target) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(target).get_text_config()
