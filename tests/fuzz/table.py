"""The counts of a run, for people and for programs."""

import importlib.metadata
import platform
from typing import Any

from fuzz.harness import BAD, Tally

PACKAGES = ("fledge", "hypothesis", "msgspec", "torch", "transformers", "safetensors", "pyarrow", "aiohttp")
COLUMNS = ("area", "cases", "accepted", "refused", *BAD)


def document(tally: Tally, *, seed: int | None, seconds: float) -> dict[str, Any]:
    """Counts by area, the faults, versions and conditions, JSON-ready."""
    rows = [
        {
            "area": area,
            "cases": sum(number for (its, _, _), number in tally.counts.items() if its == area),
            **{outcome: tally.count(area, outcome) for outcome in ("accepted", "refused", *BAD)},  # type: ignore[arg-type]
        }
        for area in tally.areas
    ]
    total = {name: "all" if name == "area" else sum(row[name] for row in rows) for name in COLUMNS}
    return {
        "seed": seed, "seconds": round(seconds, 1), "peak_mib": tally.peak >> 20, "rows": [*rows, total],
        "faults": [vars(fault) for fault in tally.faults.values()],
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in found["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += ["", f"Seed {found['seed']}, {found['seconds']} s, peak memory {found['peak_mib']} MiB; {versions}."]
    return "\n".join(lines) + "\n"
