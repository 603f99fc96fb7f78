"""`fledge doctor`: what this machine has of what fledge needs, in ten lines."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fledge.console import say
from fledge.errors import UserError

MARKS = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}


@dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """What is looked at."""

    path: Annotated[str | None, tyro.conf.Positional] = None
    """Nothing: the machine. A head, data or stored states: what `fledge inspect PATH` shows."""
    target: str | None = None
    """With a path: the target."""


def doctor(args: DoctorArgs) -> None:
    """Check this machine: Python, packages, torch, compiler, memory, GPU, disk, ports and the hub. Fails only where
    something that every command needs is broken."""
    if args.path is not None:
        from fledge.commands.inspect import InspectArgs, inspect

        inspect(InspectArgs(path=args.path, target=args.target))
        return
    from fledge.doctor.machine import examine

    broken = []
    for found in examine():
        say(f"{MARKS[found.state]}  {found.what:<8}  {found.text}")
        broken += [found.what] if found.state == "broken" else []
    if broken:
        raise UserError(f"{', '.join(broken)}: mend what the lines above say; commands will fail until then.")
