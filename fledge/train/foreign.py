"""Training from AngelSlim's folders: states made by its own scripts, embedding and head from the target's files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fledge.console import say, warn
from fledge.data.tokenize import load_tokenizer, model_eos_token_ids
from fledge.data.vocab import control_ids
from fledge.errors import UserError
from fledge.storage.angelslim import VOCAB_FILE, AngelSlimFolder, read_vocab_mapping
from fledge.target.head import TargetEnds
from fledge.target.record import TargetRecord, chosen_taps
from fledge.train.arguments import TrainSettings
from fledge.train.records import Part, Records, as_it_is, split
from fledge.train.sources import Source, limited


def angelslim_source(args: TrainSettings) -> Source:
    """States made by AngelSlim's own scripts; embedding and head are read from the target's files."""
    inputs = args.inputs
    name = inputs.target
    if not name:
        raise UserError("--target is needed with .ckpt files: embedding and head are in its files.")
    ends = TargetEnds.from_files(name, lm_head_key=inputs.lm_head_key or None)
    taps = chosen_taps(args.draft.tap_layers or None, ends.text_config.num_hidden_layers)
    vocab_size, hidden_size = ends.head.weight.shape

    def opened(paths: Sequence[str]) -> list[Part]:
        folders = [
            AngelSlimFolder(Path(path).expanduser(), hidden_size, len(taps), max_length=inputs.model_max_length)
            for path in paths
        ]
        return [Part.whole(folder) for folder in folders]

    train, held_out = opened(inputs.states), opened(inputs.eval_states)
    if not held_out and inputs.eval_fraction:
        train, held_out = split(train, inputs.eval_fraction)
    counts = torch.stack([part.store.counts(part.rows, vocab_size) for part in train]).sum(0)
    records = Records(train)
    first = records[0]
    head = ends.head.to(args.trainer.device, first.last_hidden.dtype)
    _check_teacher(first, head, args.trainer.device, train[0].store.folder)
    mapping = read_vocab_mapping(train[0].store.folder, vocab_size)
    always = _always(args, mapping, counts, name)
    say(f"training from {len(records)} AngelSlim files; of the target only embedding and head are loaded")
    return Source(
        train=limited(records, inputs.max_samples), eval=Records(held_out) if held_out else None, to_record=as_it_is,
        counts=counts, always=always, text_config=ends.text_config, tap_layers=taps, embedding=head.embedding,
        head_weight=head.weight, teacher_head=head, target_name=name, device=args.trainer.device,
    )  # fmt: skip


def _always(args: TrainSettings, mapping: Tensor | None, counts: Tensor, name: str) -> Sequence[int]:
    """The mapping's own ids when the vocabulary has its size, else stop and control tokens."""
    if mapping is not None and args.draft.draft_vocab_size in (None, len(mapping)):
        args.draft = replace(args.draft, draft_vocab_size=len(mapping))
        say(f"draft vocabulary: the {len(mapping)} tokens of {VOCAB_FILE}")
        return mapping.tolist()
    if mapping is not None:
        warn(f"{VOCAB_FILE} has {len(mapping)} tokens, --draft-vocab-size {args.draft.draft_vocab_size}: counted anew.")
    special = [id for id, token in load_tokenizer(name).added_tokens_decoder.items() if token.special]
    return control_ids(counts, special, model_eos_token_ids(name))


def _check_teacher(record: TargetRecord, head: Callable[[Tensor], Tensor], device: torch.device, folder: Path) -> None:
    """A target hardly ever misses all of its own tokens: then its states are not what the head reads."""
    taught = (record.loss_mask[1:]).nonzero()[:, 0]
    if not len(taught):
        return
    said = head(record.last_hidden[taught].to(device)).argmax(-1).cpu()
    right = (said == record.input_ids[taught + 1]).float().mean().item()
    say(f"{folder}: the target's head predicts {right:.0%} of the first file's supervised tokens")
    if right < 0.05:
        warn(f"{folder}: that is next to nothing. Are target_hiddens taken after the final norm, and of this target?")
