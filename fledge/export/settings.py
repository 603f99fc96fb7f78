"""How a head is exported, and how another trainer's head is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fledge.drafters.settings import TapConvention
from fledge.outputs import OutputSettings
from fledge.ranges import Positive


@dataclass(frozen=True, kw_only=True)
class ExportSettings(OutputSettings):
    """What is exported, and for whom."""

    head: str
    """The head's folder."""
    to: Literal["vllm", "sglang", "speculators", "eagle", "llama.cpp"]
    """Who will read it."""
    target: str = ""
    """The target's name as it will be served; written into the speculators config, the model card and its commands."""
    license: str | None = None
    """Licence of the head: apache-2.0, mit or what else the hub has a name for, else NAME=URL. None: the card states
    none."""
    report: Path | None = None
    """summary.json of a `fledge bench` run of this head: its measured tau goes into the model card."""
    notes: Path | None = None
    """Markdown that goes into the model card as it is: where the data came from, more figures."""
    push_to_hub: str | None = None
    """Also upload the exported folder to this hub repository (`name/head`)."""
    private: bool = False
    """Make the hub repository private when it is created."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(OutputSettings):
    """What is brought here, and how it is read."""

    head: str
    """A head of EAGLE, AngelSlim, SpecForge, speculators or ModelOpt, or one exported for an engine."""
    target: str | None = None
    """The target's folder or hub name: its depth fixes what tap ids mean that the head does not explain."""
    tap_convention: TapConvention = "auto"
    """What its tap ids mean: input of layer i (vLLM, speculators) or output of layer i (SGLang, SpecForge). auto: by
    the trainer, else by the target's usual three; never guessed."""
    rope_theta: Positive | None = None
    """The rope base the head was trained with, where its config states another."""
