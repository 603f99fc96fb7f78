"""`--init-from`: start from an earlier head, in any layout, whatever draft vocabulary the new one has.

The layer's weights are taken as they are. A row of lm_head belongs to a target token, not to a place: it follows its
token into the new vocabulary. Tokens the old head could not say start from the target's own rows, which training has
left behind: `as_trained` maps them to where they would be by now.

An EAGLE-3 head may start an EAGLE-3.1 head: `lift_norms`. One of more layers too: new ones begin by changing nothing.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.console import say, warn
from fledge.drafters.eagle3.checkpoint import same_embedding
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.foreign import read_any
from fledge.drafters.eagle3.head import EMBEDDING, Head
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.layer_config import SIZES
from fledge.errors import UserError
from fledge.target.record import TargetRecord

FLAGS = ("num_layers", "fc_norm", "norm_output", "norm_before_residual", "qk_norm", "sliding_window")
LIFTED = ("fc_norm", "norm_output")  # what EAGLE-3.1 adds
HEAD = "lm_head.weight"
ROWS_PER_CHANNEL = 2  # that a map of rows to rows is fitted to, at least
RIDGE = 1e-5  # of the mean square, which keeps rows that are nearly dependent from a wild map
WRITES = ("fc.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")  # to the residual: how their names end


def architecture_of(folder: Path, num_target_layers: int, draft_type: str) -> dict[str, Any]:
    """The sizes and norm flags of a head, as overrides of what would be derived from the target.

    For EAGLE-3.1 without the two norms that an EAGLE-3 head has not: they are added.
    """
    config = read_any(folder, num_target_layers=num_target_layers).config
    added = LIFTED if draft_type == "eagle3.1" and not config.fc_norm else ()
    return {name: getattr(config, name) for name in (*SIZES, *FLAGS) if name not in added}


def continue_from(
    draft: DraftModel, folder: Path, target_head: Tensor, num_target_layers: int,
    records: Callable[[], Sequence[TargetRecord]],
) -> None:  # fmt: skip
    """Take every weight of an earlier head; lm_head rows follow their tokens, new ones are the target's (V, H).

    `records` gives a few training samples; only norms that have to be added ask for them.
    """
    before = read_any(folder, num_target_layers=num_target_layers)
    _check_fits(draft, before, folder)
    for number in range(before.config.num_layers, draft.config.num_layers):
        draft.layer(number).pass_on()
    kept = take_weights(draft, before, target_head)
    if EMBEDDING in before.tensors and not same_embedding(before.tensors[EMBEDDING], draft.embedding):
        draft.own_embedding(before.tensors[EMBEDDING].to(draft.embedding))
        say(f"{folder} brings a token embedding of its own: it is kept, and not trained")
    say(f"continuing from {folder}: {kept} of {draft.config.draft_vocab_size} vocabulary rows kept, the others "
        f"follow from the target's head")  # fmt: skip
    if lifts(draft.config, before.config):
        lift_norms(draft, records(), feedback_is_normed=before.config.norm_output)
        say(f"{folder} is an EAGLE-3 head: norms for EAGLE-3.1 are added, scaled so that it starts where that head is")
    if (old := before.config.rope_parameters) != (new := draft.config.rope_parameters):
        warn(f"--init-from {folder}: its rope is {old}, this run trains at {new}; the head has to learn it anew.")


def lifts(ours: DraftConfig, theirs: DraftConfig) -> bool:
    """Whether an EAGLE-3 head starts an EAGLE-3.1 head."""
    return ours.fc_norm and not theirs.fc_norm


@torch.no_grad()
def lift_norms(draft: DraftModel, records: Sequence[TargetRecord], *, feedback_is_normed: bool) -> None:
    """Let EAGLE-3.1's new norms do as little as a norm can: take each row's own size away, and put back the usual one.

    - each tap's norm gets the median RMS of that tap, so f is what it was but for the rows' differences in size;
    - the final norm, whose output is now fed back, gets one weight in every channel, and lm_head takes over the
      channels' weights it had: the logits are unchanged, and the fed back state is f'' but for its size.

    Which size the states f have is free, as all that reads them norms them first: it is set halfway (geometrically)
    between what they had and what lm_head used to read. With the former lm_head's weights would be so small (in a
    trained SmolLM2 head by 18) that the first steps at any usual rate wreck them; with the latter those that write f.
    """
    weights = dict(draft.named_parameters())
    for tap in range(len(draft.config.tap_layers)):
        size = median_rms(torch.cat([record.tap_hidden[:, tap] for record in records]))
        weights[f"fc_norm.{tap}.weight"].fill_(size)
    if feedback_is_normed:
        return
    read = float(draft.norm.weight.square().mean().sqrt())
    had = median_rms(torch.cat([first_step(draft, record) for record in records]))
    size = read if draft.config.norm_before_residual else math.sqrt(read * had)
    if not draft.config.norm_before_residual:  # else the residual is a normed state, whose size is not free
        for name in weights:
            if name.endswith(WRITES):
                weights[name].mul_(size / had)
    draft.lm_head.weight.mul_(draft.norm.weight / size)
    draft.norm.weight.fill_(size)


def median_rms(states: Tensor) -> float:
    """(N, H) -> the median row's."""
    return float(states.float().pow(2).mean(-1).sqrt().median())


def first_step(draft: DraftModel, record: TargetRecord) -> Tensor:
    """f'' (T - 1, H) of the first draft step at every position."""
    f = draft.fuse(record.tap_hidden[:-1])
    cos, sin = draft.rope(record.position_ids[..., :-1].to(f.device))
    return draft.step(record.input_ids[None, 1:], f[None], None, WholeText(), rope=(cos[None], sin[None]))[0]


class WholeText:
    """A cache for a draft that reads a text at once."""

    def update(self, keys: Tensor, values: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        return keys, values


@torch.no_grad()
def take_weights(draft: DraftModel, before: Head, target_head: Tensor) -> int:
    """Copy the weights; returns how many rows of lm_head came along. target_head (V, H)."""
    new = dict(draft.named_parameters())
    for name, parameter in new.items():
        if name != HEAD and name in before.tensors:
            parameter.copy_(before.tensors[name])
    ids = draft.target_ids(torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device)).cpu()
    old_ids = before.target_ids
    kept = torch.isin(ids, old_ids)
    rows = before.tensors[HEAD][torch.searchsorted(old_ids, ids[kept])].float()
    targets = target_head[ids.to(target_head.device)].float().cpu()
    weight = targets.new_empty(targets.shape)
    weight[kept], weight[~kept] = rows, as_trained(targets[~kept], targets[kept], rows)
    draft.lm_head.weight.copy_(weight)
    return int(kept.sum())


def as_trained(new: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(M, H) rows of the target -> where training would have brought them, by the linear map that fits rows it did
    bring somewhere: before -> after (K, H), least squares. With too few of those for a map, as they are.

    Without it, rows of another scale than the trained ones outshout them: a lifted EAGLE-3.1 head, whose rows are four
    times smaller than the target's, began at a loss of 43 and a tau of 1.0.
    """
    if not len(new) or len(before) < ROWS_PER_CHANNEL * before.shape[1]:
        return new
    squares = (before.T @ before).double()
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    return new @ torch.linalg.solve(squares, (before.T @ after).double()).float()


def _check_fits(draft: DraftModel, before: Head, folder: Path) -> None:
    ours, theirs = draft.config, before.config
    if ours.tap_layers != theirs.tap_layers:
        raise UserError(
            f"--init-from {folder}: it reads the inputs of layers {list(theirs.tap_layers)}, this run taps "
            f"{list(ours.tap_layers)}. Give --tap-layers {' '.join(map(str, theirs.tap_layers))}."
        )
    _check_same(ours, theirs, folder)
    sizes = {name: tuple(parameter.shape) for name, parameter in draft.named_parameters()}
    common = sizes.keys() & before.tensors.keys() - {HEAD}
    differ = [name for name in common if tuple(before.tensors[name].shape) != sizes[name]]
    missing = {name for name in sizes.keys() - before.tensors.keys() if not name.startswith(("fc_norm.", "layers."))}
    assert not differ and not missing, f"{differ=} {missing=} although the configs agree"


def _check_same(ours: DraftConfig, theirs: DraftConfig, folder: Path) -> None:
    added = LIFTED if lifts(ours, theirs) else ()
    if ours.num_layers > theirs.num_layers:
        added = (*added, "num_layers")
    names = ("hidden_size", "vocab_size", *(name for name in SIZES if name != "draft_vocab_size"), *FLAGS)
    for name in (name for name in names if name not in added):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"--init-from {folder}: its {name} is {getattr(theirs, name)}, this draft's {getattr(ours, name)}. "
                f"Leave out --draft_config and --draft_layers (the head's own sizes are used), or start a fresh head; "
                f"one of another target cannot be continued."
            )
