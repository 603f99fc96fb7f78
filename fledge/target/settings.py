"""Settings of commands that run a target."""

from dataclasses import dataclass
from typing import Literal

from fledge.ranges import Natural

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DtypeSettings:
    """The target's numbers."""

    dtype: Dtype = "auto"
    """Number format the target runs in; auto takes the checkpoint's own."""


@dataclass(frozen=True, kw_only=True)
class PrefillSettings:
    """How the target reads a text."""

    prefill_chunk: Natural = 0
    """Most tokens of a forward pass of the target; longer texts are read in parts behind a cache, in less memory, with
    states that are the same to rounding. 0: at once."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(DtypeSettings):
    """Where the target runs in this process."""

    device: str | None = None
    """Where the target runs, such as cpu or cuda:1. None takes the accelerator when there is one."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The target."""

    target: str
    """The target: a transformers model folder, a hub name, or a GGUF file (unpacked once, as bf16)."""


@dataclass(frozen=True, kw_only=True)
class TapSettings:
    """The target's layers that feed the draft."""

    tap_layers: tuple[Natural, ...] = ()
    """Decoder layers whose inputs feed the draft. Empty: 2, N // 2, N - 3, which needs a target of 7 layers."""
