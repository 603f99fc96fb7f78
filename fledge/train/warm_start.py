"""`--init_from`: start from an earlier head, in any layout, whatever draft vocabulary the new one has.

The layer's weights are taken as they are. A row of lm_head belongs to a target token, not to a place: it follows its
token into the new vocabulary, and tokens the old head could not say start from the target's own rows.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.console import say, warn
from fledge.draft.config import SIZES, DraftConfig
from fledge.draft.foreign import read_any
from fledge.draft.head import Head
from fledge.draft.model import DraftModel
from fledge.errors import UserError

FLAGS = ("fc_norm", "norm_output", "norm_before_residual", "sliding_window")
HEAD = "lm_head.weight"


def architecture_of(folder: Path, num_target_layers: int, draft_type: str) -> dict[str, Any]:
    """The sizes and norm flags of a head, as overrides of what would be derived from the target."""
    config = read_any(folder, num_target_layers=num_target_layers).config
    if draft_type == "eagle3.1" and not config.fc_norm:
        raise UserError(
            f"--init_from {folder} is an EAGLE-3 head, --draft_type asks for eagle3.1, whose norms it has not learnt. "
            f"Leave out --draft_type, or start a fresh head."
        )
    return {name: getattr(config, name) for name in (*SIZES, *FLAGS)}


def continue_from(draft: DraftModel, folder: Path, target_head: Tensor, num_target_layers: int) -> None:
    """Take every weight of an earlier head; lm_head rows follow their tokens, new ones are the target's (V, H)."""
    before = read_any(folder, num_target_layers=num_target_layers)
    _check_fits(draft, before, folder)
    draft.warm_start_head(target_head)
    kept = take_weights(draft, before)
    say(f"continuing from {folder}: {kept} of {draft.config.draft_vocab_size} vocabulary rows kept, the others from "
        f"the target's head")  # fmt: skip
    if (old := before.config.rope_parameters) != (new := draft.config.rope_parameters):
        warn(f"--init_from {folder}: its rope is {old}, this run trains at {new}; the head has to learn it anew.")


@torch.no_grad()
def take_weights(draft: DraftModel, before: Head) -> int:
    """Copy the weights; returns how many rows of lm_head came along."""
    new = dict(draft.named_parameters())
    for name, parameter in new.items():
        if name != HEAD:
            parameter.copy_(before.tensors[name])
    ids = draft.target_ids(torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device)).cpu()
    old_ids = before.target_ids
    kept = torch.isin(ids, old_ids)
    rows = before.tensors[HEAD][torch.searchsorted(old_ids, ids[kept])]
    draft.lm_head.weight[kept.to(draft.lm_head.weight.device)] = rows.to(draft.lm_head.weight)
    return int(kept.sum())


def _check_fits(draft: DraftModel, before: Head, folder: Path) -> None:
    ours, theirs = draft.config, before.config
    if ours.tap_layers != theirs.tap_layers:
        raise UserError(
            f"--init_from {folder}: it reads the inputs of layers {list(theirs.tap_layers)}, this run taps "
            f"{list(ours.tap_layers)}. Give --tap_layers {' '.join(map(str, theirs.tap_layers))}."
        )
    _check_same(ours, theirs, folder)
    sizes = {name: tuple(parameter.shape) for name, parameter in draft.named_parameters()}
    differ = [name for name, shape in sizes.items() if name != HEAD and tuple(before.tensors[name].shape) != shape]
    assert not differ, f"{differ=} although the configs agree"


def _check_same(ours: DraftConfig, theirs: DraftConfig, folder: Path) -> None:
    names = ("hidden_size", "vocab_size", *(name for name in SIZES if name != "draft_vocab_size"), *FLAGS)
    for name in names:
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"--init_from {folder}: its {name} is {getattr(theirs, name)}, this draft's {getattr(ours, name)}. "
                f"Leave out --draft_model_config_path (the head's own sizes are used), or start a fresh head; a head "
                f"of another target cannot be continued."
            )
