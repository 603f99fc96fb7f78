"""What the doctor finds: one record, made by whoever looks, shown and mended by others."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
Topic = Literal["taps", "vocab", "rope", "norms", "tie", "positions", "dtype", "target"]


@dataclass(frozen=True)
class Finding:
    """One difference that costs something. `repair` says what --fix would do about it; empty: nothing."""

    severity: Severity
    topic: Topic
    what: str
    cost: str
    repair: str = ""
