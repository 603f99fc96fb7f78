"""Writing a store: the plan first, then shard after shard, each finished for good before the next counts.

Several writers (ranks) share a folder without locks: a shard belongs to the rank its number modulo the world size
names, a finished one is announced by its own small file in sealed/, and the manifest is always rewritten from those.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fledge.console import say
from fledge.data.tokenize import Sample
from fledge.errors import FULL, UserError, free_bytes, gib
from fledge.outputs import (
    Claim,
    Output,
    check,
    check_sealed,
    claim,
    document_has,
    file_sha256,
    is_own,
    replacing,
    write_file,
)
from fledge.parsing import read_json
from fledge.storage.states.manifest import (
    HEAD,
    MANIFEST,
    PLAN,
    SEALED,
    Identity,
    Manifest,
    ShardEntry,
    canonical,
    read_manifest,
)
from fledge.storage.states.plan import Plan, PlannedShard
from fledge.storage.states.shard import ShardBuffer, token_bytes
from fledge.target.head import TargetHead

STORE = Output(
    "extract",
    (MANIFEST, PLAN, SEALED, HEAD, "shard-*.safetensors", "provenance.json"),
    lambda folder: document_has(folder / MANIFEST, "kind", "identity") or (folder / SEALED).is_dir(),
)
WAIT_FOR_FIRST_RANK_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which of several writers this one is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


class StoreWriter:
    """A store being written. Use as a context manager; `pending` are this rank's shards that are still to be made."""

    def __init__(
        self, folder: Path, identity: Identity, head: TargetHead, samples: Iterable[Sample], *, shard_bytes: int,
        ranks: Ranks = Ranks(), overwrite: bool = False,  # noqa: B008 - frozen
    ) -> None:  # fmt: skip
        check(folder, STORE, overwrite=overwrite)
        self.overwrite = overwrite
        self.folder, self.identity, self.head, self.ranks = folder, identity, head, ranks
        per_shard = max(1, int(shard_bytes / token_bytes(identity)))
        continues = is_own(folder, STORE)
        if continues:
            self._check_identity()
        self.plan = (Plan.read(folder) if continues else Plan(())).extended(samples, per_shard)
        self._claim: Claim | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "StoreWriter":
        if self.ranks.first:
            self._check_space()
            self._claim = claim(self.folder, STORE, overwrite=self.overwrite)
            try:
                self._begin()
            except BaseException:
                self._claim.release()
                raise
        else:
            self._wait_for_first_rank()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if self._under_way is not None:
                self._under_way.result()
        except BaseException:
            if kind is None:
                raise
        finally:
            self._background.shutdown()
            if self._claim is not None:
                self._claim.release()

    @property
    def finished(self) -> dict[int, ShardEntry]:
        """Shards that are done, by number, whoever made them."""
        return dict(read_sealed(self.folder))

    def pending(self) -> list[PlannedShard]:
        """This rank's shards that are still to be made."""
        finished = self.finished
        mine = [shard for shard in self.plan.shards if shard.number % self.ranks.world == self.ranks.rank]
        return [shard for shard in mine if shard.number not in finished]

    def estimate_bytes(self, shards: Iterable[PlannedShard]) -> int:
        """What these shards will take on the disk."""
        total = 0.0
        for shard in shards:
            share = shard.supervised / max(shard.tokens, 1)
            total += shard.tokens * token_bytes(self.identity, share)
            total += sum(len(sample.id) + 40 for sample in shard.samples) + 4096
        return int(total)

    def seal(self, buffer: ShardBuffer) -> None:
        """Write a full shard behind the back of the next one's forward passes; waits for the one before."""
        if self._under_way is not None:
            self._under_way.result()
        self._under_way = self._background.submit(self._seal, buffer)

    def finish(self) -> Manifest:
        """Wait for the last shard and bring the manifest up to date."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()
        return self._write_manifest()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _seal(self, buffer: ShardBuffer) -> None:
        with full_disk_is_an_error(self.folder):
            entry = buffer.save(self.folder)
            content = canonical(dataclasses.asdict(entry)) + b"\n"
            write_file(self.folder / SEALED / f"{buffer.shard.name}.json", content)
            self._write_manifest()

    def _write_manifest(self) -> Manifest:
        """From what is sealed, again until nothing was sealed meanwhile: the last writer leaves the whole truth."""
        while True:
            finished = self.finished
            head = self.folder / HEAD
            manifest = Manifest(
                identity=self.identity, planned_records=self.plan.num_records, plan_sha256=self.plan.sha256,
                head_bytes=head.stat().st_size, head_sha256=self._head_sha256,
                shards=tuple(finished[number] for number in sorted(finished)),
            )  # fmt: skip
            content = json.dumps(manifest.document(), indent=2, ensure_ascii=False).encode() + b"\n"
            write_file(self.folder / MANIFEST, content, tag=f".rank{self.ranks.rank}")
            if self.finished.keys() == finished.keys():
                return manifest

    def _check_identity(self) -> None:
        if not (self.folder / MANIFEST).is_file():
            return
        before = read_manifest(self.folder).identity
        if differ := before.differences(self.identity):
            raise UserError(
                f"{self.folder}: holds states made with {'; '.join(differ)}. Repeat those settings to continue it, or "
                f"choose another --output-dir."
            )
        self.identity = before  # the target may be named from another place

    def _begin(self) -> None:
        strangers = [path.name for path in self.folder.glob("shard-*.safetensors")]
        if strangers and not (self.folder / SEALED).is_dir():
            raise UserError(f"{self.folder}: has shards but no {SEALED}/ folder. Choose an empty --output-dir.")
        self._check_finished()
        (self.folder / SEALED).mkdir(exist_ok=True)
        with full_disk_is_an_error(self.folder):
            self._write_head()
            self.plan.write(self.folder)
            self._write_manifest()

    def _check_finished(self) -> None:
        for number, entry in self.finished.items():
            again = f"Restore it, or delete {self.folder / SEALED}/shard-{number:05d}.json to have it made again."
            check_sealed(self.folder / entry.file, entry.bytes, mend=again)

    def _check_space(self) -> None:
        finished = self.finished
        needed = self.estimate_bytes(shard for shard in self.plan.shards if shard.number not in finished)
        if not (self.folder / HEAD).is_file():
            needed += self.head.embedding.nbytes * (1 if self.head.tied else 2)
        free = free_bytes(self.folder)
        tokens = sum(shard.tokens for shard in self.plan.shards if shard.number not in finished)
        per_token = token_bytes(self.identity) / 1024
        say(f"{self.folder}: {tokens} tokens to extract take about {gib(needed)} ({per_token:.1f} KiB per token); "
            f"{gib(free)} free")  # fmt: skip
        if needed > free:
            raise UserError(
                f"{self.folder}: about {gib(needed)} are needed and {gib(free)} are free. Free space, choose another "
                f"disk, or store less: --tap-storage fp8, --last-storage supervised, --model-max-length, --max-samples."
            )

    def _write_head(self) -> None:
        path = self.folder / HEAD
        if path.is_file():
            TargetHead.load(path, self.head.embedding.device, self.identity.digest)
        else:
            with replacing(path) as temporary:
                self.head.save(temporary, self.identity.digest)

    @property
    def _head_sha256(self) -> str:
        if not hasattr(self, "_head_digest"):
            self._head_digest = file_sha256(self.folder / HEAD)
        return self._head_digest

    def _wait_for_first_rank(self) -> None:
        start = time.monotonic()
        while time.monotonic() - start < WAIT_FOR_FIRST_RANK_S:
            if (self.folder / MANIFEST).is_file() and read_manifest(self.folder).plan_sha256 == self.plan.sha256:
                return
            time.sleep(0.2)
        raise UserError(f"{self.folder}: rank {self.ranks.rank} waited an hour for rank 0 to write the plan.")


def read_sealed(folder: Path) -> Iterator[tuple[int, ShardEntry]]:
    """(number, entry) of every finished shard."""
    for path in sorted((folder / SEALED).glob("shard-*.json")):
        entry = read_json(path, ShardEntry, hint="Delete it; the shard is made again.")
        if entry.file != f"{path.stem}.safetensors":
            raise UserError(f"{path}: it describes {entry.file}. Delete it; the shard is made again.")
        yield entry.number, entry


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """A disk that fills up (or a quota) in the middle is one line; what was sealed before stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = sum(1 for _ in (folder / SEALED).glob("shard-*.json"))
        raise UserError(
            f"{folder}: the disk (or its quota) is full. {kept} finished shards are kept; free space and run the same "
            f"command again to go on from there."
        ) from error
