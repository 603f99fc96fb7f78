"""Block drafts of other trainers, read into our form: whose they are, what an absent field means, which taps they name.

The trap is the block layout. A draft trained to fill in its slots and read as one that samples from its anchor drafts
every token one place off, at an acceptance of one in a hundred and without an error. Files that do not state it mean
what their trainer does; a trainer is a row of `BLOCK_ORIGINS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.console import say
from fledge.drafters.dspark.checkpoint import BlockHead, check_block
from fledge.drafters.dspark.config import DSPARK, config_of_document
from fledge.drafters.eagle3.foreign import read_weights
from fledge.drafters.layer_config import HINT, JSON, window_of_document
from fledge.errors import UserError
from fledge.parsing import read_json

# What files hold besides the draft: the target's ends (bound at run time), buffers, speculators' teacher.
DROPPED = ("embed_tokens.weight", "rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")
PREFIXES = ("draft_model.", "model.")  # of training checkpoints


@dataclass(frozen=True)
class BlockOrigin:
    """One trainer's way of writing a block draft."""

    name: str
    recognise: Callable[[JSON], bool]
    sample_from_anchor: bool
    """What a file means that does not say."""
    taps: str = "target_layer_ids"
    """The field that names them; `aux_hidden_state_layer_ids` are inputs of layers, `target_layer_ids` outputs."""


BLOCK_ORIGINS = (
    BlockOrigin("fledge", lambda document: isinstance(document.get("fledge"), dict), False),
    BlockOrigin(
        "speculators", lambda document: document.get("speculators_model_type") in ("dflash", "dspark"), False,
        "aux_hidden_state_layer_ids",
    ),
    BlockOrigin("DeepSpec", lambda document: DSPARK in (document.get("architectures") or ()), True),
    BlockOrigin("z-lab or SpecForge", lambda document: "dflash_config" in document, False),
)  # fmt: skip


def block_origin_of(document: JSON) -> BlockOrigin | None:
    """Whose block draft a config.json belongs to; None where it is no block draft's."""
    is_block = "dflash_config" in document or DSPARK in (document.get("architectures") or ())
    speculators = document.get("speculators_model_type")
    if speculators is not None and speculators not in ("dflash", "dspark") or not (is_block or speculators):
        return None
    return next(origin for origin in BLOCK_ORIGINS if origin.recognise(document))


def read_any_block(folder: Path) -> BlockHead:
    """A block draft in any layout."""
    path = folder / "config.json"
    document = read_json(path, JSON, hint=HINT)
    origin = block_origin_of(document)
    if origin is None:
        raise UserError(f"{path}: not the config of a block draft (DFlash or DSpark).")
    config = config_of_document(in_our_form(document, origin), path)
    tensors = {our_name(name): tensor for name, tensor in read_weights(folder).items()}
    head = BlockHead(config, _without_targets(tensors, config.full_vocab, folder))
    check_block(head, folder)
    return head


def in_our_form(document: JSON, origin: BlockOrigin) -> JSON:
    """The same config with our names of its fields; what the origin leaves unsaid is said."""
    inner: dict[str, Any] = document.get("dflash_config") or {}
    flat = {**document, **(document.get("transformer_layer_config") or {}), **inner}
    if origin.taps == "aux_hidden_state_layer_ids" and (inputs := document.get(origin.taps)):
        flat["target_layer_ids"] = [layer - 1 for layer in inputs]
    if flat.get("sample_from_anchor") is None:
        flat["sample_from_anchor"] = origin.sample_from_anchor
    if flat.get("use_swa"):
        flat |= {"sliding_window": flat.get("swa_window_size"), "layer_types": ["sliding_attention"]}
    if flat.get("causal") is None:  # windows are causal unless something says otherwise
        flat["causal"] = window_of_document(flat) is not None and not document.get("sliding_window_non_causal")
    flat["draft_vocab_size"] = document.get("draft_vocab_size") or flat.get("vocab_size")
    flat.pop("dflash_config", None)
    return flat


def our_name(name: str) -> str:
    """Our name of a tensor."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _without_targets(tensors: dict[str, Tensor], full_vocab: bool, folder: Path) -> dict[str, Tensor]:
    """The draft's own tensors. With a whole vocabulary its head is a copy of the target's."""
    dropped = [*DROPPED, *(("lm_head.weight", "d2t", "t2d") if full_vocab else ())]
    if found := [name for name in dropped if name in tensors and "rotary" not in name]:
        say(f"{folder}: left out are {', '.join(found)}, which are the target's")
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}
