"""`fledge inspect HEAD --target T --fix OUT`: the head as it should have been written, and a list of what changed.

Only two kinds of change are made: those the files themselves prove (d2t against t2d, an lm_head despite a tied flag)
and those that were measured. Weights are never touched.
"""

import dataclasses
from typing import Any

import torch

from fledge.doctor.check import Examination
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.foreign import t2d_from
from fledge.drafters.eagle3.head import Head
from fledge.errors import UserError
from fledge.target.record import default_tap_layers

SHOWN = ("tap_layers", "rope_parameters", "max_position_embeddings", "norm_output", "norm_before_residual")


def repaired(
    examination: Examination, target_config: Any, measured: DraftConfig | None, d2t: torch.Tensor | None
) -> tuple[Head, list[str]]:
    """The mended head and its changes in words. `measured` and `d2t` are what the doctor found best, if it measured."""
    incurable = [f for f in examination.findings if f.severity == "error" and f.topic == "target"]
    if incurable:
        raise UserError(f"{examination.folder}: {incurable[0].what}; {incurable[0].cost}. No copy was written.")
    head = examination.head
    config = dataclasses.replace(
        measured or _by_rule(examination, target_config),
        max_position_embeddings=max(head.config.max_position_embeddings, target_config.max_position_embeddings),
        target_layers=target_config.num_hidden_layers,
    )
    changes = [
        f"{name}: {getattr(head.config, name)} -> {getattr(config, name)}"
        for name in SHOWN
        if getattr(head.config, name) != getattr(config, name)
    ]
    tensors = dict(head.tensors)
    if d2t is not None:
        tensors |= {"d2t": d2t, "t2d": t2d_from(d2t, config.vocab_size)}
    tensors, cast = _one_dtype(tensors)
    changes += [f"{f.topic}: {f.what} -> {f.repair}" for f in examination.findings
                if f.topic in ("vocab", "tie", "dtype") and f.repair]  # fmt: skip
    if cast and not any(change.startswith("dtype") for change in changes):
        changes.append(f"dtype: all tensors {cast}")
    return Head(config, tensors), changes


def _by_rule(examination: Examination, target_config: Any) -> DraftConfig:
    """Without measurements: ids that are the usual three written as outputs are the usual three."""
    config, usual = examination.head.config, default_tap_layers(target_config.num_hidden_layers)
    if tuple(layer + 1 for layer in config.tap_layers) == usual:
        return dataclasses.replace(config, tap_layers=usual)
    return config


def _one_dtype(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Every weight in the dtype most values have; the name of it when something was cast."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda kind: sizes[kind])
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return cast, str(dtype).removeprefix("torch.") if len(sizes) > 1 else ""
