"""Training data from files: stores of `fledge extract`. The target is not loaded; its two ends come from the store."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fledge.console import say, warn
from fledge.data.templates import template_name
from fledge.data.vocab import control_ids
from fledge.errors import UserError
from fledge.storage.states.describe import plain_config, read_text_config
from fledge.storage.states.manifest import Identity
from fledge.storage.states.reader import HiddenStore
from fledge.target.head import TargetEnds
from fledge.train.arguments import TrainSettings
from fledge.train.records import Part, Records, as_it_is, split, warn_of_shared
from fledge.train.sources import Source, limited


def stored_source(args: TrainSettings) -> Source:
    """Stores of hidden states: the target is not loaded."""
    inputs = args.inputs
    train_stores, eval_stores = open_stores(args)
    train, held_out = [Part.whole(store) for store in train_stores], [Part.whole(store) for store in eval_stores]
    if not held_out and inputs.eval_fraction:
        train, held_out = split(train, inputs.eval_fraction)
    warn_of_shared((id for part in train for id in part.ids), (id for part in held_out for id in part.ids))
    counts, always = count_stored(train)
    say(f"training from stored states; the target ({train_stores[0].identity.target}) is not loaded")
    return source_from(args, train_stores[0], Records(train), Records(held_out) if held_out else None, counts, always)


def count_stored(parts: Sequence[Part]) -> tuple[Tensor, list[int]]:
    """(V,) supervised tokens of these records, and the ids that belong to every draft vocabulary."""
    if not parts:
        raise UserError("no records to train on are left beside the held-out ones: store more of other conversations.")
    counts = torch.stack([part.store.counts(part.rows) for part in parts]).sum(0)
    identity = parts[0].store.identity
    return counts, list(control_ids(counts, identity.special_token_ids, identity.stop_token_ids))


def source_from(
    args: TrainSettings,
    store: HiddenStore,
    train: Records,
    held_out: Records | None,
    counts: Tensor,
    always: Sequence[int],
) -> Source:  # fmt: skip
    """Records with the ends of the target they were made by."""
    if not len(train):
        raise UserError(f"{', '.join(args.inputs.states)}: no records. `fledge inspect` says what is there.")
    head = store.head(args.trainer.device)
    taps = tuple(args.draft.tap_layers or store.identity.tap_layers)
    for records in (train, held_out):
        for part in records.parts if records is not None else ():
            part.store.choose(taps)
    return Source(
        train=limited(train, args.inputs.max_samples),
        eval=held_out,
        to_record=as_it_is,
        counts=counts,
        always=always,
        text_config=read_text_config(store.identity),
        tap_layers=taps,
        embedding=head.embedding,
        head_weight=head.weight,
        teacher_head=head,
        teacher_rows=head.rows,
        target_name=store.identity.target,
        device=args.trainer.device,
        states_digest=states_digest(train),
    )


def states_digest(records: Records) -> str:
    """A digest of the checksums of these records: another store under the same path has others."""
    digest = hashlib.sha256()
    for part in records.parts:
        digest.update(part.store.identity.digest.encode() + part.store.checksums(part.rows).tobytes())
    return digest.hexdigest()


def open_stores(args: TrainSettings) -> tuple[list[HiddenStore], list[HiddenStore]]:
    """The train and eval stores, checked against each other and against the flags."""
    inputs = args.inputs
    train, held_out = (
        [HiddenStore(Path(path).expanduser(), max_length=inputs.model_max_length) for path in paths]
        for paths in (inputs.states, inputs.eval_states)
    )
    first = train[0]
    for store in (*train, *held_out):
        differ = store.identity.differences(first.identity, ignore=("max_length", "tap_layers"))
        if differ:
            raise UserError(
                f"{store.folder} was made with {'; '.join(differ)} (as in {first.folder}). States of different targets "
                f"or settings do not mix."
            )
        cut = int((store.lengths > inputs.model_max_length).sum())
        if cut:
            warn(f"{store.folder}: {cut} of {len(store)} records are cut to {inputs.model_max_length} tokens.")
    check_flags(args, first.identity, first.folder)
    check_taps(args.draft.tap_layers or first.identity.tap_layers, [*train, *held_out])
    return train, held_out


def check_taps(wanted: Sequence[int], stores: Sequence[HiddenStore]) -> None:
    """Stores may hold other taps beside those that are trained on; these they must have."""
    common = sorted(set.intersection(*(set(store.identity.tap_layers) for store in stores)))
    for store in stores:
        if missing := sorted(set(wanted) - set(store.identity.tap_layers)):
            choose = f"Choose among {common}, which all stores have (--tap-layers), or extract" if common else "Extract"
            raise UserError(
                f"{store.folder}: it has the inputs of layers {store.identity.tap_layers}, without {missing}, which "
                f"this run taps. {choose} again."
            )


def check_flags(args: TrainSettings, identity: Identity, folder: Path) -> None:
    """What the command line says about the target must be what the states were made with."""
    inputs = args.inputs
    found = target_differs(inputs.target, identity) if inputs.target else []
    if inputs.chat_template_type and template_name(inputs.chat_template_type) != template_name(identity.template):
        found.append(f"chat template {identity.template!r}, not {inputs.chat_template_type!r}")
    if inputs.train_last_turn_only and not identity.last_turn_only:
        found.append("all turns supervised, not the last alone (--train_last_turn_only)")
    if inputs.dtype not in ("auto", identity.dtype):
        found.append(f"dtype {identity.dtype}, not {inputs.dtype}")
    if inputs.lm_head_key and inputs.lm_head_key not in identity.head_keys:
        found.append(f"the head {' = '.join(identity.head_keys)}, not {inputs.lm_head_key} (--lm-head-key)")
    if found:
        raise UserError(
            f"{folder}: its states were made with {'; '.join(found)}. Leave the flag out to train with the store's, or "
            f"extract again with yours."
        )


def target_differs(name: str, identity: Identity) -> list[str]:
    """Whether `name` is another target than the store's: by its files when they are at hand, else by its last name."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        from transformers import AutoConfig

        config = plain_config(AutoConfig.from_pretrained(name).get_text_config())
        differ = sorted(key for key in config if config[key] != identity.text_config.get(key))
        if not differ and any(folder.glob("*.safetensors")):
            ends = TargetEnds.from_files(name, dtype=getattr(torch, identity.dtype))
            differ = [] if ends.head.digest() == identity.weights else ["the weights of embedding and head"]
        return [f"target {identity.target}, not {name} ({', '.join(differ[:4])} differ)"] if differ else []
    return [] if Path(name).name == Path(identity.target).name else [f"target {identity.target}, not {name}"]
