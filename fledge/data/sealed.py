"""What is known of a finished shard of regenerated answers, and whether its file still is what was sealed.

The journal writes these facts when a shard is finished; whoever reads the answers later compares. Hashing takes a
second per gigabyte or two, far less than reading the rows.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fledge.errors import UserError
from fledge.outputs import check_sealed
from fledge.parsing import read_json
from fledge.ranges import Count, Natural

MANIFEST, INNER = "manifest.json", ".journal"


class SealedFile(msgspec.Struct, kw_only=True):
    """A finished shard, as manifest.json lists it."""

    file: Annotated[str, Meta(pattern=r"^shard-\d{5,}\.jsonl$")]
    first_row: Natural
    input_rows: Count
    rows: Natural
    bytes: Natural
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    counts: dict[str, Natural]


class Sealed(SealedFile, kw_only=True):
    """The same with the rows that have no answer, as `.journal/00000.sealed` keeps it."""

    rejects: dict[int, dict[str, str]]


class JournalManifest(msgspec.Struct):
    """manifest.json of a run, as far as it is read again."""

    format: int
    settings: dict[str, Any]
    shards: list[SealedFile]


class AnyManifest(msgspec.Struct):
    """A manifest.json of whatever made it; only the journal's has both settings and shards, and no kind."""

    kind: Any = None
    settings: Any = None
    shards: Any = None


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.jsonl"


def read_sealed(path: Path) -> Sealed:
    """The facts in a `.sealed` file."""
    sealed = read_json(path, Sealed, hint=_again(path))
    if sealed.rows + len(sealed.rejects) != sealed.input_rows:
        raise UserError(
            f"{path}: {sealed.rows} rows and {len(sealed.rejects)} rejects are not its {sealed.input_rows} input rows. "
            f"{_again(path)}"
        )
    return sealed


def is_unfinished(folder: Path) -> bool:
    """Whether a run has rows here that are in no shard yet."""
    return any((folder / INNER).glob("*.partial"))


def check_file(folder: Path, sealed: SealedFile) -> None:
    """Refuse a shard whose file is gone or no longer what it was when it was finished."""
    path = folder / sealed.file
    number = sealed.file.removeprefix("shard-").removesuffix(".jsonl")
    check_sealed(path, sealed.bytes, sealed.sha256, mend=_again(folder / INNER / f"{number}.sealed"))


def verify_sealed(path: Path) -> None:
    """Check every shard of regenerated answers that a file or folder of data holds; other data passes."""
    manifests = [path.parent / MANIFEST] if path.is_file() else sorted(path.rglob(MANIFEST))
    for manifest in manifests:
        for sealed in sealed_files(manifest.parent):
            if path.is_dir() or sealed.file == path.name:
                check_file(manifest.parent, sealed)


def sealed_files(folder: Path) -> list[SealedFile]:
    """The finished shards of a folder: by its journal, or by the manifest where only that was copied."""
    path = folder / MANIFEST
    if not path.is_file() or not any(folder.glob("shard-*.jsonl")):
        return []
    manifest = read_json(path, AnyManifest, hint="Remove it if it does not belong to the data.")
    if manifest.kind is not None or manifest.settings is None or manifest.shards is None:
        return []
    inner = sorted((folder / INNER).glob("*.sealed"))
    return [read_sealed(one) for one in inner] or list(read_json(path, JournalManifest).shards)


def _again(path: Path) -> str:
    return f"Restore it, or delete {path} and run the same `fledge regenerate`: its rows are asked again."
