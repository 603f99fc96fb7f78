"""Rotary embedding of the head over one axis or several: the layout of the target, number for number.

A multimodal rope gives every token R positions (time, height, width), all equal for text, and divides the rotary
dimensions among them. How it divides them differs by family, and the angle of a dimension is always the one a plain
rope has there, so a layout is no more than *which axis each dimension follows*. For R = 3, head_dim = 16:

    chunked       (Qwen2-VL, Qwen2.5-VL)   sections [2, 3, 3]      t t h h h w w w | t t h h h w w w
    interleaved   (Qwen3-VL, Qwen3.5)      sections [4, 2, 2]      t h w t h w t t | t h w t h w t t
    across        (HunYuan-VL)  R = 4      sections [2, 2, 2, 2]   p p p p w w w w | h h h h i i i i

Knows configs and positions; tested against transformers' own rotary module of each family.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.errors import UserError

# N rows, R axes, D rotary dimensions

Layout = Literal["chunked", "interleaved", "across"]

# model_type of the text config -> layout
LAYOUTS: dict[str, Layout] = {
    "qwen2_vl_text": "chunked", "qwen2_5_vl_text": "chunked",
    "qwen3_vl_text": "interleaved", "qwen3_vl_moe_text": "interleaved",
    "qwen3_5_text": "interleaved", "qwen3_5_moe_text": "interleaved", "qwen4_exp_text": "interleaved",
    "hunyuan_vl_text": "across",
}  # fmt: skip


def with_layout(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The target's rope_parameters with its layout said in words every engine reads, where there is more than one axis.

    Engines know `mrope_interleaved`; the layout HunYuan-VL has is named by a key of ours.
    """
    if not rope.get("mrope_section"):
        return {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    if model_type not in LAYOUTS:
        raise UserError(
            f"model type {model_type!r} has a multimodal rope whose layout fledge does not know (mrope_section "
            f"{rope['mrope_section']}). Add a row to fledge/drafters/rope.py; see docs/add-a-target.md."
        )
    layout = LAYOUTS[model_type]
    known = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    known["mrope_section"] = list(rope["mrope_section"])
    known["mrope_interleaved"] = layout == "interleaved"
    return {**known, "mrope_layout": layout} if layout == "across" else known


def check_rope(rope: dict[str, Any], head_dim: int) -> None:
    """Refuse a rope that gives no finite, positive frequency for every pair of dimensions of a head."""
    share = rope.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    numbers = {"rope_theta": rope.get("rope_theta"), "factor": rope.get("factor"), "partial_rotary_factor": share}
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise UserError(f"draft config: {name}={value!r} of its rope must be a finite number above 0.")
    if not 0 < int(head_dim * share) <= head_dim or int(head_dim * share) % 2:
        raise UserError(f"draft config: {share} of head_dim={head_dim} is no even number of dimensions to rotate.")
    axis_of_dims(rope, int(head_dim * share))


def without_axes(rope: dict[str, Any]) -> dict[str, Any]:
    """The rope of one axis: what decides the angles."""
    return {key: value for key, value in rope.items() if not key.startswith("mrope_")}


def axis_of_dims(rope: dict[str, Any], rotary_dim: int) -> list[int] | None:
    """The axis each rotary dimension follows; None for a rope of one axis."""
    sections = rope.get("mrope_section")
    if not sections:
        return None
    if not isinstance(sections, list) or not all(isinstance(size, int) and size > 0 for size in sections):
        raise UserError(f"mrope_section {sections!r} is no list of sizes.")
    half, layout = rotary_dim // 2, rope.get("mrope_layout")
    if sum(sections) != half:
        raise UserError(f"mrope_section {sections} adds up to {sum(sections)}; half the rotary dimensions are {half}.")
    if layout == "across":
        return [axis for axis, size in enumerate(sections) for _ in range(2 * size)]
    if rope.get("mrope_interleaved"):
        first = [0] * half
        for axis in range(1, len(sections)):
            for dim in range(axis, min(half, len(sections) * sections[axis]), len(sections)):
                first[dim] = axis
        return first * 2
    return [axis for axis, size in enumerate(sections) for _ in range(size)] * 2


def described(rope: dict[str, Any]) -> str:
    """The layout for people."""
    if not rope.get("mrope_section"):
        return "none"
    layout = rope.get("mrope_layout") or ("interleaved" if rope.get("mrope_interleaved") else "chunked")
    return f"{layout} {list(rope['mrope_section'])}"


def num_axes(rope: dict[str, Any]) -> int:
    return len(rope.get("mrope_section") or [0])


def pick_axis(angles: Tensor, axis_of_dim: Tensor) -> Tensor:
    """cos or sin of every axis (R, .., D) to the one each dimension follows (.., D)."""
    index = axis_of_dim.expand(1, *angles.shape[1:])
    return angles.gather(0, index)[0]


def as_index(axis_of_dim: list[int] | None) -> Tensor | None:
    return None if axis_of_dim is None else torch.tensor(axis_of_dim)
