"""fledge: draft heads (EAGLE-3, DFlash, DSpark), from conversations to an honest speed-up.

From Python: `fledge.load(target, draft)` and `fledge.speculate(draft)` (docs/python.md). Nothing is imported before it
is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.api.custom_generate import speculate
    from fledge.api.speculator import GeneratedText, Speculator, load
    from fledge.drafters.tree import TreeShape
    from fledge.errors import UserError

__version__ = "0.1.0"
__all__ = ["GeneratedText", "Speculator", "TreeShape", "UserError", "load", "speculate"]

_MODULES = {
    "GeneratedText": "fledge.api.speculator", "Speculator": "fledge.api.speculator", "load": "fledge.api.speculator",
    "speculate": "fledge.api.custom_generate", "TreeShape": "fledge.drafters.tree", "UserError": "fledge.errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fledge' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
