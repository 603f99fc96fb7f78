"""How hidden states are stored."""

from dataclasses import dataclass

from fledge.storage.states.manifest import LastStorage, TapStorage


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How states are stored."""

    tap_storage: TapStorage = "same"
    """fp8 halves the taps' size: one scale per row and tap."""
    last_storage: LastStorage = "all"
    """supervised keeps the last state only where the assistant wrote: nothing else teaches."""
