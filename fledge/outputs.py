"""Output folders: whose they are, one writer at a time, and files that appear whole or not at all.

A folder that a command writes carries a marker, `.fledge.json`: which command wrote it, under which names, in which
run. `check` refuses a folder that holds files under those names and no marker of the same command, and touches nothing;
`claim` takes the folder's lock and leaves the marker. What is written goes through `replacing` (a file of any library),
`writing` (bytes as they come), `write_file` (text or bytes), `staged` (files that belong together) or `written` (a
whole folder). `check_sealed` compares what was finished, answers and hidden states alike. Knows files only.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

import fledge
from fledge.console import say, warn
from fledge.errors import UserError, naming
from fledge.parsing import read_json
from fledge.redaction import redacted

T = TypeVar("T")

MARKER, LOCK = ".fledge.json", ".fledge.lock"
STAGING, READY, DELETING = ".fledge-writing", ".fledge-ready", ".fledge-deleting"


class Owner(msgspec.Struct):
    """One command's entry in a marker."""

    names: list[str]
    run: str


class Marker(msgspec.Struct):
    """The document `.fledge.json`."""

    fledge: str
    owners: dict[str, Owner]


@dataclass(frozen=True, kw_only=True)
class OverwriteSettings:
    """What may be replaced."""

    overwrite: bool = False
    """Replace what lies there under names that this command writes, though it did not write them. Without it such a
    folder or file is refused."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings(OverwriteSettings):
    """What is written, and where."""

    output_dir: Path
    """Where everything goes. What an earlier run left there is continued or added to, where the command can."""


@dataclass(frozen=True)
class Output:
    """What a command writes into its output folder."""

    command: str
    names: tuple[str, ...]  # glob patterns
    earlier: Callable[[Path], bool] = lambda folder: False
    """Whether the command wrote this folder before fledge left markers."""

    def found(self, folder: Path) -> list[Path]:
        """What lies in the folder under names of this command; what this module keeps there is none of it."""
        found = {path for pattern in self.names for path in folder.glob(pattern)}
        return sorted(path for path in found if path.name not in (MARKER, LOCK, STAGING, READY))


def owner(folder: Path, command: str) -> Owner | None:
    """This command's entry in the folder's marker, if there is one."""
    path = folder / MARKER
    if not path.is_file():
        return None
    return read_json(path, Marker, hint="Remove it if the folder's files may be replaced.").owners.get(command)


def is_own(folder: Path, output: Output) -> bool:
    """Whether this command wrote the folder."""
    return owner(folder, output.command) is not None or output.earlier(folder)


def document_has(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and all(key in document for key in keys)


def check(folder: Path, output: Output, *, overwrite: bool = False) -> None:
    """Refuse a folder that holds files of others under names that this command writes. Touches nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, a folder is needed. Choose another output folder.")
    found = output.found(folder)
    if not found or overwrite or is_own(folder, output):
        return
    names = ", ".join(path.name for path in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    raise UserError(
        f"{folder}: holds {names}, which `fledge {output.command}` would replace and did not write. Choose another "
        f"output folder, or give --overwrite to have these replaced."
    )


class Claim:
    """The right to write a folder: its lock, held until `release`. A dead process's lock is free at once."""

    _held: "set[Claim]" = set()

    def __init__(self, folder: Path, output: Output) -> None:
        self.run, path = "", folder / LOCK
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        Claim._held.add(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file), path.stat()):  # a new folder took its name meanwhile
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            holder = os.pread(self._file, 200, 0).decode("utf-8", "replace").strip()
            self.release()
            raise UserError(
                f"{folder}: another run is writing there{f' ({holder})' if holder else ''}. Wait for it or choose "
                f"another folder."
            ) from None
        except OSError as error:
            warn(f"{folder}: cannot be locked ({error.strerror}); do not start a second run there.")
        with naming(path):
            os.ftruncate(self._file, 0)
            holder = f"fledge {output.command}, process {os.getpid()} on {socket.gethostname()}"
            os.pwrite(self._file, holder.encode(), 0)

    def release(self) -> None:
        """Let others write the folder."""
        Claim._held.discard(self)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _release_in_child() -> None:
    """A forked worker that outlives its parent must not hold the parent's locks."""
    for claim in list(Claim._held):
        claim.release()


os.register_at_fork(after_in_child=_release_in_child)


def claim(folder: Path, output: Output, *, overwrite: bool = False, clear: bool = True) -> Claim:
    """Lock the folder, make it if need be, and mark it as this command's. Call it once all inputs are read.

    With `overwrite`, files of others under this command's names are deleted (`clear`) or left to be replaced.
    """
    check(folder, output, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    held = Claim(folder, output)
    try:
        check(folder, output, overwrite=overwrite)
        _finish_interrupted(folder)
        if clear and not is_own(folder, output):
            delete(output.found(folder))
        held.run = mark(folder, output).run
    except BaseException:
        held.release()
        raise
    return held


def mark(folder: Path, output: Output, run: str | None = None) -> Owner:
    """Write this command into the folder's marker (as this run). An entry that is there already is kept."""
    entry = owner(folder, output.command)
    if entry is not None and run in (None, entry.run):
        return entry
    path = folder / MARKER
    owners = read_json(path, Marker).owners if path.is_file() else {}
    owners[output.command] = entry = Owner(list(output.names), uuid.uuid4().hex if run is None else run)
    write_file(path, msgspec.json.format(msgspec.json.encode(Marker(fledge.__version__, owners))) + b"\n")
    return entry


def delete(paths: Iterable[Path]) -> None:
    """Remove files, links and folders. A folder gets another name first: what a kill leaves of it is not mistaken."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            aside = path.with_name(f".{path.name}{DELETING}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def written(folder: Path, output: Output, *, overwrite: bool = False) -> Iterator[Path]:
    """Where to write what shall become `folder`. A new folder is built beside and renamed; see `staged` for others."""
    if folder.exists():
        with claim(folder, output, overwrite=overwrite, clear=False), staged(folder) as building:
            yield building
        return
    beside = folder.with_name(f".{folder.name}{STAGING}")
    with claim(beside, output):
        try:
            delete([path for path in beside.iterdir() if path.name not in (LOCK, MARKER)])  # of a killed process
            with naming(folder):
                yield beside
            _settle(beside)
            os.rename(beside, folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    sync_folder(folder.parent)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Where to write files that together replace those of the same names in `folder`, once all are on the disk.

    They are renamed one after the other; what a kill leaves to be renamed then is renamed by the next writer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted(folder)
    building = folder / STAGING
    building.mkdir()
    try:
        with naming(folder):
            yield building
        _settle(building)
        os.rename(building, folder / READY)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _finish_interrupted(folder)


def _finish_interrupted(folder: Path) -> None:
    """Rename what a killed process had complete, remove what it had not."""
    for left in [folder / STAGING, *folder.glob(f".*{DELETING}")]:
        shutil.rmtree(left, ignore_errors=True)
    ready = folder / READY
    if ready.is_dir():
        for path in ready.iterdir():
            os.replace(path, folder / path.name)
        ready.rmdir()
        sync_folder(folder)


def _settle(folder: Path) -> None:
    """Give every file the permissions of the umask (safetensors makes them private), and put it on the disk."""
    probe = folder / (STAGING + ".mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file() and path.name != LOCK:
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall become `path`: synced and renamed at the end, removed if that fails.

    In a folder of its own: safetensors writes to a temporary file beside the one it is given, which a kill leaves.
    """
    folder = path.with_name(path.name + ".writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        temporary = folder / path.name
        with naming(path):
            yield temporary
        _settle(folder)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(path.parent)


@contextmanager
def writing(path: Path, temporary: Path, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Write under a temporary name, sync, rename, sync the folder: after a crash the old or the new file is there."""
    with naming(path, needed_bytes), open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_file(path: Path, content: bytes | str, tag: str = "") -> None:
    """Write a file whole. Processes that may write the same file at once give a `tag` each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with writing(path, path.with_name(f"{path.name}{tag}.tmp"), len(content)) as file:
        file.write(content)


def in_full(value: Any) -> Any:
    """Names of files that are there, as absolute paths: one folder may be named from two places. Lists, each entry."""
    if isinstance(value, list | tuple):
        return [in_full(entry) for entry in value]
    if isinstance(value, str) and value and os.path.exists(path := os.path.expanduser(value)):
        return os.path.realpath(path)
    return value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sealed(path: Path, size: int, sha256: str | None = None, *, mend: str) -> None:
    """Refuse a file that is gone or no longer what it was when it was finished; `mend` says what to do then."""
    if not path.is_file() or path.stat().st_size != size:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise UserError(f"{path}: {found}; it was sealed with {size} bytes. {mend}")
    if sha256 is not None and file_sha256(path) != sha256:
        raise UserError(f"{path}: its SHA-256 is not the one it was sealed with; it was damaged or edited. {mend}")


def write_json(path: Path, document: Any) -> None:
    """Write a document for people and programs, whole and without secrets."""
    write_file(path, json.dumps(redacted(document), indent=2, ensure_ascii=False, default=str) + "\n")


def write_figures(path: Path, document: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the file that a flag named; one that is there is replaced if it holds the same kind of document."""
    if path.exists() and not overwrite and not document_has(path, *document):
        raise UserError(
            f"{path}: is there and was not written by this command. Name another file, or give --overwrite."
        )
    write_json(path, document)
    say(f"figures written to {path}")


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, which may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FLEDGE_CACHE") or Path(home) / "fledge").expanduser() / name


def cached(name: str, key: str, kind: type[T], make: Callable[[], T]) -> T:
    """What `make` made for this key at some time, from the user's cache; where it is not there or cannot be read, it is
    made again, and kept if the folder can be written."""
    path = cache_folder(name) / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    made = make()
    with suppress(OSError, UserError):
        write_file(path, msgspec.json.encode(made), tag=f".{os.getpid()}")
    return made


def sync_folder(folder: Path) -> None:
    """Make renames in this folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
