"""`fledge inspect STORE`: verify every byte, then show what is inside."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fledge.console import say, show_table, warn
from fledge.data.vocab import control_ids, coverage
from fledge.errors import gib
from fledge.outputs import write_figures
from fledge.storage.states.reader import HiddenStore

COVERAGE_SIZES = (8_192, 16_384, 32_000)
QUANTILES = (0.05, 0.5, 0.95)


class Wanted(Protocol):
    """The flags of `fledge inspect` that concern a store."""

    @property
    def path(self) -> str: ...
    @property
    def json(self) -> Path | None: ...
    @property
    def overwrite(self) -> bool: ...


def inspect_store(args: Wanted) -> None:
    """Check sizes, headers, checksums and identities of a whole store and print its statistics."""
    folder = Path(args.path).expanduser()
    store = HiddenStore(folder, allow_incomplete=True)
    store.verify()
    document = figures(store)
    rows = [(key.replace("_", " "), value) for key, value in document["store"].items()]
    show_table(str(folder), ("", "value"), [*rows, ("size", gib(document["counts"]["bytes"]))])
    show_table("Counts", ("", "count"), [(key.replace("_", " "), value) for key, value in document["counts"].items()])
    if document["length"]:
        show_table("Lengths", tuple(document["length"]), [tuple(document["length"].values())])
    shares = [(size, f"{share:.2%}") for size, share in document["coverage"].items()]
    show_table("Draft vocabulary", ("size", "coverage"), shares)
    if not document["complete"]:
        warn(f"{folder}: incomplete. Run the same `fledge extract` again to finish it.")
    if args.json is not None:
        write_figures(args.json, document, overwrite=args.overwrite)
    say(f"{folder}: every checksum matches ({len(store.shards)} shards, {gib(document['counts']['bytes'])})")


def figures(store: HiddenStore) -> dict[str, Any]:
    """Every figure of a store, JSON-ready."""
    identity, document = store.identity, store.manifest.document()
    counts = store.counts()
    always = control_ids(counts, identity.special_token_ids, identity.stop_token_ids)
    lengths = store.lengths
    shown = ("target", "revision", "tap_layers", "dtype", "tap_storage", "last_storage", "template", "max_length",
             "backend")  # fmt: skip
    return {
        "store": {name: getattr(identity, name) for name in shown},
        "complete": document["complete"],
        "counts": document["counts"],
        "length": {
            "min": int(lengths.min()), **{f"p{q * 100:.0f}": int(np.quantile(lengths, q)) for q in QUANTILES},
            "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1),
        } if len(lengths) else {},
        "distinct_supervised_tokens": int((counts > 0).sum()),
        "coverage": {str(size): share for size, share in coverage(counts, COVERAGE_SIZES, always).items()},
        "shards": document["shards"],
    }  # fmt: skip
