"""Which sample goes into which shard: decided once, before the first forward pass, and written down.

Knows ids and lengths, no tensors of states. Samples keep their order; a shard is full at a number of tokens. Run again
with the same data and the plan is the same; with more data, what is new goes into new shards behind the old ones.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from fledge.data.tokenize import Sample
from fledge.errors import UserError
from fledge.outputs import write_file
from fledge.parsing import read_json_lines
from fledge.ranges import Count, Natural
from fledge.storage.states.manifest import PLAN

RESTORE = "Restore it, or extract into a new folder."


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a plan. `crc` is over its tokens and mask: the same id with other content is found."""

    id: str
    length: int
    supervised: int
    crc: int


@dataclass(frozen=True)
class PlannedShard:
    """One file to be."""

    number: int
    samples: tuple[PlannedSample, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"

    @property
    def tokens(self) -> int:
        return sum(sample.length for sample in self.samples)

    @property
    def supervised(self) -> int:
        return sum(sample.supervised for sample in self.samples)

    def line(self) -> str:
        rows = [[s.id, s.length, s.supervised, s.crc] for s in self.samples]
        return json.dumps({"shard": self.number, "samples": rows}, ensure_ascii=False)


class PlanLine(msgspec.Struct):
    """A shard as plan.jsonl has it: id, length, supervised tokens and checksum of every sample."""

    shard: Natural
    samples: Annotated[list[tuple[str, Count, Natural, Natural]], msgspec.Meta(min_length=1)]


class Plan:
    """Every shard of a store, in order."""

    def __init__(self, shards: Sequence[PlannedShard] = ()) -> None:
        self.shards = list(shards)
        self.place = {s.id: (shard.number, s) for shard in self.shards for s in shard.samples}

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan in `folder`; empty when there is none."""
        path = folder / PLAN
        if not path.is_file():
            return cls()
        lines = read_json_lines(path, PlanLine, hint=RESTORE)
        plan = cls([PlannedShard(line.shard, tuple(PlannedSample(*s) for s in line.samples)) for _, line in lines])
        numbers = {shard.number for shard in plan.shards}
        if len(numbers) < len(plan.shards) or len(plan.place) < sum(len(shard.samples) for shard in plan.shards):
            raise UserError(f"{path}: not a readable plan: a shard or a sample stands there twice. {RESTORE}")
        return plan

    def content(self) -> bytes:
        return "".join(shard.line() + "\n" for shard in self.shards).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    @property
    def num_records(self) -> int:
        return len(self.place)

    def write(self, folder: Path) -> None:
        write_file(folder / PLAN, self.content())

    def extended(self, samples: Iterable[Sample], tokens_per_shard: int) -> "Plan":
        """This plan with shards for every sample it does not hold yet."""
        fresh: list[PlannedSample] = []
        seen: set[str] = set()
        for sample in samples:
            planned = describe(sample)
            known = self.place.get(planned.id)
            if known is not None:
                check_same(known[1], sample, "the store")
            if planned.id in seen:
                raise UserError(
                    f"sample id {planned.id!r} appears twice in the data. Give rows their own `id`, or rename one of "
                    f"the files: rows without an id are named after their file."
                )
            seen.add(planned.id)
            if known is None:
                fresh.append(planned)
        first = max((shard.number for shard in self.shards), default=-1) + 1
        return Plan([*self.shards, *cut(fresh, tokens_per_shard, first)])


def cut(samples: Iterable[PlannedSample], tokens_per_shard: int, first: int) -> list[PlannedShard]:
    """Shards of about `tokens_per_shard` tokens, numbered from `first`; a longer sample has one of its own."""
    shards: list[PlannedShard] = []
    waiting: list[PlannedSample] = []
    tokens = 0
    for sample in samples:
        if waiting and tokens + sample.length > tokens_per_shard:
            shards.append(PlannedShard(first + len(shards), tuple(waiting)))
            waiting, tokens = [], 0
        waiting.append(sample)
        tokens += sample.length
    if waiting:
        shards.append(PlannedShard(first + len(shards), tuple(waiting)))
    return shards


def check_same(planned: PlannedSample, sample: Sample, where: str) -> None:
    """The sample must have the tokens and the mask it was planned with."""
    if planned != describe(sample):
        raise UserError(
            f"sample {sample.id!r}: {where} holds this id with other tokens ({planned.length} tokens, now "
            f"{len(sample.input_ids)}). The data, its template or the length changed: extract into a new folder."
        )


def describe(sample: Sample) -> PlannedSample:
    """A sample's entry in a plan. Another picture with as many tokens is another sample."""
    crc = zlib.crc32(sample.loss_mask.numpy().tobytes(), zlib.crc32(sample.input_ids.numpy().tobytes()))
    for image in sample.images:
        crc = zlib.crc32(image.digest.encode(), crc)
    return PlannedSample(sample.id, len(sample.input_ids), int(sample.loss_mask.sum()), crc)
