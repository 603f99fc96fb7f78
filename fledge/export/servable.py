"""Whether a head's files are such that vLLM could draft with them, before a server is started."""

import re
from pathlib import Path
from typing import Any

from fledge.console import say
from fledge.errors import UserError
from fledge.export.engines import VLLM, check_servable


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
