"""Conversations in, a store of hidden states out.

Lays the samples out in shards, then fills what is missing, one sample per forward pass. Started again it goes on where
it stopped; started with more data it adds to the store. Knows where records come from only as a `Producer`.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fledge import provenance
from fledge.console import ProgressBar, print_document, progress, say, show_table, warn
from fledge.data.dataset import TokenizedData
from fledge.data.image_urls import allow_image_urls
from fledge.data.tokenize import ChatTemplate, Sample
from fledge.errors import UserError, gib
from fledge.extraction.settings import ExtractSettings
from fledge.http_client import base_url
from fledge.outputs import check
from fledge.servers.hidden_states import EngineTarget
from fledge.storage.states.describe import describe_states
from fledge.storage.states.manifest import Identity, Manifest
from fledge.storage.states.shard import ShardBuffer
from fledge.storage.states.writer import STORE, Ranks, StoreWriter
from fledge.target import tensor_parallel
from fledge.target.head import TargetEnds, TargetHead
from fledge.target.live import BatchedSource, LiveSource
from fledge.target.model import Target, default_device
from fledge.target.record import TargetRecord


class Producer(Protocol):
    """Whoever turns samples into records."""

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]: ...


def extract(args: ExtractSettings) -> None:
    """Store the target's hidden states for a data set, so that training needs no target.

    Resumes where it stopped, adds what is new, refuses to mix targets or templates, and checks the disk first. Runs on
    several GPUs under torchrun, or with --num-workers through Ray.
    """
    check(args.output_dir, STORE, overwrite=args.overwrite)
    for server in args.server or ():
        base_url(server)
    alone = args.num_workers <= 1
    manifest = extract_share(args, ranks_of_environment()) if alone else extract_with_workers(args)
    if manifest is None:
        return
    provenance.write(args.output_dir / "provenance.json", args)
    counts = manifest.document()["counts"]
    rows = [("records", counts["records"]), ("tokens", counts["tokens"]), ("supervised tokens", counts["supervised"]),
            ("shards", len(manifest.shards)), ("size", gib(counts["bytes"]))]  # fmt: skip
    show_table(str(args.output_dir), ("", "count"), rows)
    if not manifest.complete:
        missing = manifest.planned_records - manifest.records
        warn(f"{missing} planned records are not there yet; the run that makes them is still to finish.")
    print_document({"output_dir": str(args.output_dir), "complete": manifest.complete, **counts})


def extract_share(args: ExtractSettings, ranks: Ranks) -> Manifest | None:
    """One process's part of the work. The manifest for the first rank, None for the others."""
    if args.tp_plan:
        return extract_in_parts(args, ranks)
    return fill_from(open_target(args), args, ranks)


def extract_in_parts(args: ExtractSettings, ranks: Ranks) -> Manifest | None:
    """One target over all ranks: the first writes the whole store."""
    tensor_parallel.check_world(ranks.world, str(args.tp_plan))
    other = args.num_workers > 1 or args.device_map or args.batch_tokens or args.prefill_chunk
    if args.target_backend != "hf" or other:
        raise UserError(
            "--tp-plan is for --target-backend hf under torchrun, without --num-workers, --device-map, --batch-tokens, "
            "--prefill-chunk."
        )
    target = load_target(args)
    if not ranks.first:
        tensor_parallel.follow(target)
        return None
    try:
        # the loaded head may be a part of the whole
        head = TargetEnds.from_files(args.target, dtype=target.dtype).head
        producer = tensor_parallel.LeadingSource(target, head.to(target.device))
        return fill_from(open_loaded(args, target, head, producer), args, Ranks())
    finally:
        tensor_parallel.dismiss()


def fill_from(opened: "OpenTarget", args: ExtractSettings, ranks: Ranks) -> Manifest | None:
    samples = Samples.read(args, opened.template)
    manifest = fill(
        args.output_dir, opened.identity, opened.head, opened.producer, samples, shard_bytes=int(args.shard_mb * 2**20),
        ranks=ranks, pinned=opened.pinned, overwrite=args.overwrite,
    )  # fmt: skip
    return manifest if ranks.first else None


def fill(
    folder: Path, identity: Identity, head: TargetHead, producer: Producer, samples: "Samples", *, shard_bytes: int,
    ranks: Ranks = Ranks(), pinned: bool = False, overwrite: bool = False,  # noqa: B008 - frozen
) -> Manifest:  # fmt: skip
    """Bring a store up to these samples: the plan, then every pending shard of this rank."""
    with StoreWriter(
        folder, identity, head, samples, shard_bytes=shard_bytes, ranks=ranks, overwrite=overwrite
    ) as writer:
        pending = writer.pending()
        away = [shard for shard in pending if any(s.id not in samples.index for s in shard.samples)]
        if away:
            warn(f"{len(away)} shards planned by an earlier run wait for samples that are not in this data.")
        todo = [shard for shard in pending if shard not in away]
        total = sum(shard.tokens for shard in writer.plan.shards if shard.number % ranks.world == ranks.rank)
        left = sum(shard.tokens for shard in pending)
        if todo:
            done = f", {total - left} are there already" if total > left else ""
            say(f"extracting {sum(s.tokens for s in todo)} tokens in {len(todo)} shards{done}")
        with _shown(ranks, total, total - left) as bar:
            for shard in todo:
                buffer = ShardBuffer(shard, writer.identity, pinned=pinned)
                for record in producer.records(samples.ahead([planned.id for planned in shard.samples])):
                    buffer.put(record)
                    bar.advance(len(record))
                writer.seal(buffer)
        return writer.finish()


class Samples:
    """The samples of several data paths, in order, found by id."""

    def __init__(self, data: Any, loaded: Any, ids: Iterable[str], positions: Iterable[int], threads: int = 0) -> None:
        """`data` and `loaded` are the same samples, the latter with pixels; `threads` read those ahead (0: none do)."""
        self._data, self._loaded, self.ids, self._positions = data, loaded, list(ids), list(positions)
        self._threads = threads
        self.index = dict(zip(self.ids, self._positions, strict=True))

    @classmethod
    def read(cls, args: ExtractSettings, template: ChatTemplate) -> "Samples":
        """Tokenise the data of the command."""
        parts = [
            TokenizedData.from_path(
                path, template, max_length=args.model_max_length, data_format=args.data_format,
                max_reject_share=args.max_reject_share, num_proc=args.num_proc, columns=args.columns,
                repeated_ids=args.repeated_ids, split=args.split,
            )
            for path in args.data
        ]  # fmt: skip
        return cls.of(parts, args.max_samples, threads=args.num_proc if template.vision else 0)

    @classmethod
    def of(cls, parts: Sequence[TokenizedData], max_samples: int | None = None, threads: int = 0) -> "Samples":
        """All samples of these parts, or the first so many."""
        data: Any = torch.utils.data.ConcatDataset(parts) if parts else []  # type: ignore[arg-type]
        pixels: list[Any] = [part.loaded() for part in parts]
        loaded: Any = torch.utils.data.ConcatDataset(pixels) if parts else []
        ids = [id for part in parts for id in part.ids][:max_samples]
        return cls(data, loaded, ids, range(len(ids)), threads)

    def only(self, ids: Set[str]) -> "Samples":
        """Those with these ids, in the same order."""
        kept = [(id, at) for id, at in zip(self.ids, self._positions, strict=True) if id in ids]
        return Samples(self._data, self._loaded, [id for id, _ in kept], [at for _, at in kept], self._threads)

    def __iter__(self) -> Iterator[Sample]:
        return (self._data[position] for position in self._positions)

    def get(self, id: str) -> Sample:
        """One sample, its pictures made pixels."""
        return self._loaded[self.index[id]]

    def ahead(self, ids: Sequence[str]) -> Iterator[Sample]:
        """Samples in this order; threads read the next ones' pictures while the target works on one."""
        if not self._threads:
            yield from map(self.get, ids)
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="pictures") as pool:
            under_way: deque[Future[Sample]] = deque()
            for id in ids:
                under_way.append(pool.submit(self.get, id))
                if len(under_way) > 2 * self._threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()


@dataclass(frozen=True)
class OpenTarget:
    """What a run needs of the target, whichever backend runs it."""

    template: ChatTemplate
    identity: Identity
    head: TargetHead
    producer: Producer
    pinned: bool


def open_target(args: ExtractSettings) -> OpenTarget:
    """Load the target (hf), or its ends and a client of the server (vllm)."""
    allow_image_urls(args.allow_image_urls)
    if args.target_backend == "vllm":
        if args.batch_tokens or args.prefill_chunk:
            name = "--batch-tokens" if args.batch_tokens else "--prefill-chunk"
            raise UserError(f"{name} is for --target-backend hf; a server makes its own batches.")
        return open_served(args)
    if args.batch_tokens < 0:
        raise UserError(f"--batch-tokens {args.batch_tokens}: give a number of tokens, or 0 for one sample per pass.")
    if args.server:
        raise UserError("--server is for --target-backend vllm; the hf backend runs the target in this process.")
    target = load_target(args)
    chunk = args.prefill_chunk
    alone = LiveSource(target, prefill_chunk=chunk)
    producer = BatchedSource(target, args.batch_tokens, prefill_chunk=chunk) if args.batch_tokens else alone
    return open_loaded(args, target, TargetHead.of(target), producer)


def load_target(args: ExtractSettings) -> Target:
    return Target.from_pretrained(
        args.target, dtype=args.dtype, device=device_of_rank(), device_map=args.device_map, tp_plan=args.tp_plan,
        tap_layers=args.tap_layers or None,
        min_pixels=args.min_pixels, max_pixels=args.max_pixels, chat_template=args.chat_template_type,
    )  # fmt: skip


def open_served(args: ExtractSettings) -> OpenTarget:
    """The client of `fledge extract --target-backend vllm`."""
    target = EngineTarget.open(
        args.target, args.server, dtype=args.dtype, tap_layers=args.tap_layers or None, folder=args.server_folder
    )  # fmt: skip
    template = ChatTemplate.from_pretrained(
        args.target, args.chat_template_type or None, untraced=args.untraced,
        last_turn_only=args.train_last_turn_only,
    )  # fmt: skip
    identity = target.identity(
        template, max_length=args.model_max_length, tap_storage=args.tap_storage, last_storage=args.last_storage
    )  # fmt: skip
    return OpenTarget(template, identity, target.ends.head, target.source, False)


def open_loaded(args: ExtractSettings, target: Target, head: TargetHead, producer: Producer) -> OpenTarget:
    """A loaded target with its template and the identity of its states."""
    template = ChatTemplate(
        target.tokenizer, args.chat_template_type or None, eos_token_ids=target.eos_token_ids, vision=target.vision,
        last_turn_only=args.train_last_turn_only, untraced=args.untraced,
    )  # fmt: skip
    identity = identity_of(target, head, template, args)
    return OpenTarget(template, identity, head, producer, target.device.type == "cuda")


def identity_of(target: Target, head: TargetHead, template: ChatTemplate, args: ExtractSettings) -> Identity:
    """What the states of this run depend on."""
    return describe_states(
        target.name, target.revision, target.text_config, head, target.tap_layers, template,
        dtype=str(target.dtype).removeprefix("torch."), max_length=args.model_max_length,
        tap_storage=args.tap_storage, last_storage=args.last_storage,
    )  # fmt: skip


def ranks_of_environment() -> Ranks:
    """This process's place under torchrun (or any launcher that sets RANK and WORLD_SIZE); alone otherwise."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def device_of_rank() -> torch.device:
    """The accelerator of this local rank."""
    device = default_device()
    local = os.environ.get("LOCAL_RANK")
    return torch.device(device.type, int(local)) if local is not None and device.type != "cpu" else device


def extract_with_workers(args: ExtractSettings) -> Manifest:
    """The same work by several Ray workers: each is a rank and makes its own shards."""
    from fledge.storage.states.manifest import read_manifest
    from fledge.workers import run_jobs

    gpus = args.num_gpus_per_model if torch.accelerator.is_available() else 0
    if gpus > 1 and not args.device_map:
        raise UserError(f"--num-gpus-per-model {gpus} needs --device-map auto: else one GPU of each would do the work.")
    one = replace(args, num_workers=1)
    ranks = [Ranks(rank, args.num_workers) for rank in range(args.num_workers)]
    with _watch(args.output_dir):
        finished = run_jobs(
            lambda: None, lambda _, rank: extract_share(one, rank) and None, ranks, num_workers=args.num_workers,
            gpus_per_worker=gpus, describe=lambda rank: f"share {rank.rank + 1} of {rank.world}",
        )  # fmt: skip
        for rank, _ in finished:
            say(f"worker {rank.rank + 1} of {rank.world} is done")
    return read_manifest(args.output_dir)


@contextmanager
def _watch(folder: Path) -> Iterator[None]:
    """Say now and then how many shards are finished, while workers that cannot be heard make them."""
    stop = threading.Event()

    def tell() -> None:
        told = -1
        while not stop.wait(5.0):
            count = sum(1 for _ in (folder / "sealed").glob("shard-*.json"))
            if count != told:
                say(f"{folder}: {count} shards finished")
                told = count

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _shown(ranks: Ranks, total: int, done: int) -> AbstractContextManager[ProgressBar]:
    title = "extracting" if ranks.world == 1 else f"extracting (rank {ranks.rank} of {ranks.world})"
    return progress(title, total, done)
