"""The forms of drafts that are exported: how each is read, which layouts it has, and what its model card says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fledge.drafters.dspark.checkpoint import read_block
from fledge.drafters.dspark.config import BlockConfig, is_block_document
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.head import read_head
from fledge.drafters.layer_config import HINT, JSON
from fledge.errors import UserError
from fledge.export.block_layouts import BLOCK_LAYOUTS
from fledge.export.layouts import LAYOUTS
from fledge.parsing import read_json


class AnyHead(Protocol):
    """A draft as data."""

    @property
    def config(self) -> Any: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class AnyLayout(Protocol):
    """One way to write it."""

    @property
    def name(self) -> str: ...

    @property
    def reader(self) -> str:
        """The engine that reads it, as people call it."""
        ...

    def describe(self, config: Any, dtype: str, target: str) -> dict[str, Any]:
        """config.json"""
        ...

    def tensor_name(self, ours: str) -> str:
        """The layout's name of one of our tensors."""
        ...

    def refuse(self, head: Any) -> None:
        """An error when its reader would run another network than the draft was trained as."""
        ...

    def command(self, config: Any) -> str:
        """What serves HEAD with TARGET."""
        ...


@dataclass(frozen=True)
class Form:
    """One kind of draft."""

    recognises: Callable[[JSON], bool]
    """By config.json."""
    read: Callable[[Path], AnyHead]
    layouts: Mapping[str, Any]
    tag: Callable[[Any], str]
    """On the hub, by the config."""
    title: Callable[[Any], str]
    network: Callable[[Any], str]
    """The network in a sentence."""

    def layout(self, name: str) -> AnyLayout:
        if name not in self.layouts:
            raise UserError(f"--to {name}: this draft has no such layout. Known: {', '.join(self.layouts)}.")
        return self.layouts[name]


def _network_of_block(config: BlockConfig) -> str:
    heads = f", tied together by a Markov head of rank {config.markov_rank}" if config.markov_rank else ""
    return (
        f"{config.num_layers} decoder layers of hidden size {config.hidden_size} draft {config.num_drafts} tokens in "
        f"one pass{heads}. They read the inputs of"
    )


def _network_of_layer(config: DraftConfig) -> str:
    layers = "One decoder layer" if config.num_layers == 1 else f"{config.num_layers} decoder layers"
    return f"{layers} of hidden size {config.hidden_size}, fed by the inputs of"


FORMS = (
    Form(
        is_block_document, read_block, BLOCK_LAYOUTS, lambda config: "dspark" if config.markov_rank else "dflash",
        lambda config: "DSpark block draft" if config.markov_rank else "DFlash block draft", _network_of_block,
    ),
    Form(
        lambda document: True, read_head, LAYOUTS, lambda config: "eagle3",
        lambda config: f"EAGLE-3{'.1' if config.fc_norm and config.norm_output else ''} draft head", _network_of_layer,
    ),
)  # fmt: skip


def form_of(folder: Path) -> Form:
    """The form of the draft in this folder."""
    document = read_json(folder / "config.json", JSON, hint=HINT)
    return next(form for form in FORMS if form.recognises(document))


def form_of_config(config: Any) -> Form:
    """The form of a draft with this config."""
    return FORMS[0] if isinstance(config, BlockConfig) else FORMS[-1]
