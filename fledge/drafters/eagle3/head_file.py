"""config.json of a head, whoever wrote it: every field that fledge reads has the right type and range, or one line.

What fledge does not read is left alone, and a field may be absent or null: which ones a head needs depends on its
layout, and is said where that is known.
"""

from pathlib import Path
from typing import Literal

import msgspec

from fledge.drafters.layer_config import HINT, JSON, LayerFields, TapIds
from fledge.parsing import convert, read_json
from fledge.ranges import Count


class EagleConfig(msgspec.Struct):
    """Where EAGLE, SpecForge and ModelOpt say what is read of the target."""

    eagle_aux_hidden_state_layer_ids: TapIds | None = None


class OurMark(msgspec.Struct):
    """What fledge adds: how its tap ids are to be read."""

    tap_convention: Literal["input of decoder layer i", "output of decoder layer i"] | None = None
    target_layers: Count | None = None


class HeadFields(LayerFields):
    """The whole document."""

    architectures: list[str] | None = None
    draft_vocab_size: Count | None = None
    fc_norm: bool | None = None
    use_aux_norm: bool | None = None
    norm_output: bool | None = None
    norm_before_residual: bool | None = None
    qk_norm: bool | None = None
    eagle_aux_hidden_state_layer_ids: TapIds | None = None
    eagle_config: EagleConfig | None = None
    transformer_layer_config: LayerFields | None = None
    speculators_model_type: str | None = None
    fledge: OurMark | None = None


def read_document(path: Path, hint: str = HINT) -> JSON:
    """config.json as it stands, its fields checked."""
    document = read_json(path, JSON, hint=hint)
    convert(document, HeadFields, str(path))
    return document
