"""`fledge export HEAD`: write a head in another program's layout. `fledge.export.convert` does it."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fledge.export.settings import ExportSettings


@dataclass(frozen=True, kw_only=True)
class ExportArgs(ExportSettings):
    """The flags."""

    head: Annotated[str, tyro.conf.Positional]


def export_head(args: ExportArgs) -> None:
    """Write a head in the layout an engine reads, with its model card, and print the command that serves it."""
    from fledge.export import convert

    convert.export_head(args)
