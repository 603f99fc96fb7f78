"""A store in front of the live target: what it lacks of the given conversations is extracted and kept, once.

Records then come from files in the order of the conversations, so training is what it would be online, bit for bit.
The target is loaded only when something is missing, and is gone before training starts.
"""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fledge.console import say
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.extraction.extract import OpenTarget, Samples, fill, ranks_of_environment
from fledge.servers.hidden_states import EngineTarget
from fledge.storage.states.describe import describe_states
from fledge.storage.states.manifest import MANIFEST, read_manifest
from fledge.storage.states.plan import check_same
from fledge.storage.states.reader import HiddenStore
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.train.arguments import TrainSettings
from fledge.train.records import Part, Records, by_id, without
from fledge.train.sources import Source, count_supervised, tokenise_all
from fledge.train.stored import count_stored, open_stores, source_from

SHARD_BYTES = 256 << 20
POLL_S = 0.5


def cached_source(args: TrainSettings) -> Source:
    """The source for --states and --data (or --eval-data) together."""
    inputs = args.inputs
    if not inputs.target:
        raise UserError(
            "--target is needed beside conversations: its tokenizer, and the target itself for what "
            "the store lacks. Leave --data and --eval-data out to train on the store alone."
        )
    template = ChatTemplate.from_pretrained(
        inputs.target, inputs.chat_template_type or None, min_pixels=inputs.min_pixels,
        max_pixels=inputs.max_pixels, last_turn_only=inputs.train_last_turn_only, untraced=inputs.untraced,
    )  # fmt: skip
    parts, held_out = tokenise_all(inputs, template)
    train_ids = [id for part in parts for id in part.ids][: inputs.max_samples]
    eval_ids = [id for part in held_out for id in part.ids]
    threads = inputs.num_proc if template.vision else 0
    complete(args, template, Samples.of([*parts, *held_out], threads=threads).only({*train_ids, *eval_ids}))
    train_stores, eval_stores = open_stores(args)
    stores = [*train_stores, *eval_stores]
    if parts:
        train = by_id(stores, train_ids)
        counts, always = count_supervised(parts, train_stores[0].identity.vocab_size)
    else:  # the first store may hold the held-out samples, too: `complete` puts them there
        train = without(train_stores, eval_ids)
        counts, always = count_stored(train)
    evaluated = by_id(stores, eval_ids) if held_out else [Part.whole(store) for store in eval_stores]
    return source_from(args, train_stores[0], Records(train), Records(evaluated) if evaluated else None, counts, always)


def complete(args: TrainSettings, template: ChatTemplate, samples: Samples) -> None:
    """Extract what the stores lack into the first one."""
    inputs = args.inputs
    folders = [Path(path).expanduser() for path in (*inputs.states, *inputs.eval_states)]
    stores = [HiddenStore(folder, allow_incomplete=True) for folder in folders if (folder / MANIFEST).is_file()]
    missing = samples.only(set(samples.ids) - stored_ids(stores, samples))
    if not missing.ids:
        say(f"all {len(samples.ids)} samples are stored; the target is not loaded")
        return
    say(f"{len(missing.ids)} of {len(samples.ids)} samples are not stored yet: {folders[0]} gets them first")
    target = target_for_extraction(args, template, folders[0])
    fill(
        folders[0], target.identity, target.head, target.producer, missing,
        shard_bytes=SHARD_BYTES, ranks=ranks_of_environment(), pinned=target.pinned,
    )  # fmt: skip
    del target
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    while not read_manifest(folders[0]).complete:  # other ranks are still making their share
        time.sleep(POLL_S)


def stored_ids(stores: Sequence[HiddenStore], samples: Samples) -> set[str]:
    """Ids of these samples that are stored, each with the tokens it has now."""
    found: set[str] = set()
    for store in stores:
        here, planned = set(store.ids), store.planned
        for sample in samples:
            if sample.id in here:
                check_same(planned[sample.id], sample, str(store.folder))
                found.add(sample.id)
    return found


def target_for_extraction(args: TrainSettings, template: ChatTemplate, folder: Path) -> OpenTarget:
    """The target of the flags, and the identity of what it adds; an existing store keeps its own way of storing."""
    before = read_manifest(folder).identity if (folder / MANIFEST).is_file() else None
    kept: Any = {
        "max_length": args.inputs.model_max_length,
        "tap_storage": before.tap_storage if before else "same",
        "last_storage": before.last_storage if before else "all",
    }
    name, taps = str(args.inputs.target), args.draft.taps()
    if before and (not args.draft.tap_layers or set(args.draft.tap_layers) <= set(before.tap_layers)):
        taps = tuple(before.tap_layers)
    if args.inputs.target_backend == "vllm":
        served = EngineTarget.open(
            name, args.inputs.server, dtype=args.inputs.dtype, tap_layers=taps,
            folder=args.inputs.server_folder,
        )  # fmt: skip
        return OpenTarget(template, served.identity(template, **kept), served.ends.head, served.source, False)
    target = Target.from_pretrained(name, dtype=args.inputs.dtype, device=args.trainer.device, tap_layers=taps)
    head = TargetHead.of(target)
    identity = describe_states(
        target.name, target.revision, target.text_config, head, target.tap_layers, template,
        dtype=str(target.dtype).removeprefix("torch."), **kept,
    )  # fmt: skip
    source = LiveSource(target, prefill_chunk=args.inputs.prefill_chunk)
    return OpenTarget(template, identity, head, source, target.device.type == "cuda")
