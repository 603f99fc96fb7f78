"""`fledge convert HEAD`: bring another trainer's head into fledge's form. `fledge.export.convert` does it."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fledge.export.settings import ConvertSettings


@dataclass(frozen=True, kw_only=True)
class ConvertArgs(ConvertSettings):
    """The flags."""

    head: Annotated[str, tyro.conf.Positional]


def convert_head(args: ConvertArgs) -> None:
    """Bring another trainer's head into fledge's form, so that it can be measured, continued and exported."""
    from fledge.export import convert

    convert.convert_head(args)
