"""Whether a head's files are such that vLLM could draft with them, before a server is started."""

import re
from pathlib import Path
from typing import Any

from fledge.console import say
from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.dspark.foreign import block_origin_of, read_any_block
from fledge.drafters.layer_config import HINT, JSON
from fledge.errors import UserError
from fledge.export.engines import VLLM, check_servable
from fledge.parsing import read_json


def check_draft(draft: str, target: str, num_tokens: int) -> None:
    """Refuse a head that vLLM could not draft with. A hub name is left to vLLM: its files are not here yet."""
    folder = Path(draft).expanduser()
    if not folder.is_dir():
        if not re.match(r"^[\w.-]+/[\w.-]+$", draft) or folder.exists():
            raise UserError(f"--draft {draft}: no such folder, and no hub name either (those read NAME/HEAD).")
        say(f"{draft} is a hub name: vLLM downloads it, and it is not checked here")
        return
    text_config = _local_text_config(target)
    if block_origin_of(read_json(folder / "config.json", JSON, hint=HINT)) is None:
        return check_servable(folder, VLLM, text_config)
    if found := block_problems(read_any_block(folder).config, text_config, num_tokens):
        raise UserError(f"{folder} would not draft in {VLLM.title} {VLLM.version}: {'; '.join(found)}.")


def block_problems(config: BlockConfig, text_config: Any | None, num_tokens: int) -> list[str]:
    """What vLLM would serve at an acceptance near zero, or crash on a minute into its start."""
    found = []
    if config.sample_from_anchor and not config.markov_rank:
        found.append("it reads the slots of a DFlash draft at their own places, but this one drafts from its anchor")
    if num_tokens > config.num_drafts:
        found.append(
            f"--num-speculative-tokens {num_tokens} is more than the {config.num_drafts} drafts of its block, and "
            f"slots behind the trained ones spoil the others"
        )
    for field in ("hidden_size", "vocab_size"):
        if text_config is not None and getattr(config, field) != getattr(text_config, field):
            found.append(f"{field} is {getattr(config, field)}, the target's {getattr(text_config, field)}")
    if text_config is not None and config.tap_layers[-1] >= text_config.num_hidden_layers:
        found.append(f"tap layers {list(config.tap_layers)} in a target of {text_config.num_hidden_layers} layers")
    return found


def _local_text_config(target: str) -> Any | None:
    """The target's text config when its files are here; a hub name would mean a download before vLLM's own."""
    if not (Path(target) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(target).get_text_config()
