"""A target and its drafter, brought together from what a caller has: names, folders or loaded objects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fledge.decoding.generate import drop_sessions
from fledge.drafters.base import Drafter
from fledge.drafters.registry import kind_of, read_drafter
from fledge.target.model import Target

Draft = str | Path | Drafter | None
TapLayers = tuple[int, ...]


def pair_up(draft: Draft, make_target: Callable[[TapLayers], Target]) -> tuple[Target, Drafter | None]:
    """The target, made with the taps that the drafter reads, and the drafter. A drafter's files are read first."""
    if draft is None:
        return make_target(()), None
    if isinstance(draft, (str, Path)):
        files = read_drafter(draft)
        target = make_target(files.tap_layers or ())
        return target, files.bind(target)
    kind_of(draft)  # refuses what is none
    return make_target(draft.tap_layers or ()), draft


def target_of(model: Any, tokenizer: Any, tap_layers: TapLayers) -> Target:
    """A loaded model as a target. What could be trained of it can be trained afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    target = Target(model, tokenizer, tap_layers=tap_layers)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return target


def let_go(target: Target) -> None:
    """Free what was kept for the next call, and take the hooks off a model that may go on without us."""
    drop_sessions(target)
    target.remove_hooks()
