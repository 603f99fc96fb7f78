"""What training reads: one `Source`, whatever provides it.

There are five kinds: a live target (`live.py`), servers (`served.py`), stored states (`stored.py`), a store in front of
a target (`cached.py`), and AngelSlim's files (`foreign.py`). `open_source` in `run.py` chooses one. Training cannot
tell them apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from fledge.data.dataset import TokenizedData
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.record import TargetRecord
from fledge.train.module import HeadRows
from fledge.train.records import warn_of_shared
from fledge.train.settings import InputSettings


@dataclass(frozen=True)
class Source:
    """What training needs to know, whoever provides it: a live target or stored states."""

    train: Any  # dataset of samples or records
    eval: Any
    to_record: Callable[[Any], TargetRecord]
    counts: Tensor  # (V,) supervised tokens of the training data
    always: Sequence[int]  # ids that belong to every draft vocabulary
    text_config: Any
    tap_layers: tuple[int, ...]
    embedding: Tensor  # (V, H)
    head_weight: Tensor  # (V, H)
    teacher_head: Callable[[Tensor], Tensor]
    target_name: str
    device: torch.device
    target: Target | None = None  # where it lives in this process
    teacher_rows: HeadRows | None = None  # where records have summaries: the head of some tokens only
    states_digest: str = ""  # of stored states


def conversations(
    inputs: InputSettings, template: ChatTemplate, vocab_size: int
) -> tuple[Any, Any | None, Tensor, list[int]]:
    """Samples to train on, samples held out, (V,) supervised tokens of the former, ids of every draft vocabulary."""
    parts, held_out = tokenise_all(inputs, template)
    train_data = limited(with_pixels(parts), inputs.max_samples)
    if not len(train_data):
        raise UserError(f"{', '.join(inputs.data)}: no trainable samples. `fledge inspect` says why.")
    return train_data, with_pixels(held_out) if held_out else None, *count_supervised(parts, vocab_size)


def with_pixels(parts: Sequence[TokenizedData]) -> Any:
    """The samples of these parts; whoever reads one (a loader's worker) makes its pictures pixels."""
    loaded: list[Any] = [part.loaded() for part in parts]
    return ConcatDataset(loaded)


def tokenise_all(inputs: InputSettings, template: ChatTemplate) -> tuple[list[TokenizedData], list[TokenizedData]]:
    """The conversations to train and to evaluate on."""
    parts = [tokenize(path, template, inputs) for path in inputs.data]
    held_out = [tokenize(path, template, inputs) for path in inputs.eval_data]
    if not held_out and inputs.eval_fraction:
        split = [part.split(inputs.eval_fraction) for part in parts]
        parts, held_out = [train for train, _ in split], [held for _, held in split]
    warn_of_shared((id for part in parts for id in part.ids), (id for part in held_out for id in part.ids))
    return parts, held_out


def count_supervised(parts: Sequence[TokenizedData], vocab_size: int) -> tuple[Tensor, list[int]]:
    """(V,) supervised tokens of the training data, and the ids that belong to every draft vocabulary."""
    counts = torch.stack([_padded(part.counts, vocab_size) for part in parts]).sum(0)
    return counts, sorted({token for part in parts for token in part.always})


def tokenize(path: str, template: ChatTemplate, inputs: InputSettings) -> TokenizedData:
    return TokenizedData.from_path(
        path, template, max_length=inputs.model_max_length, data_format=inputs.data_format,
        max_reject_share=inputs.max_reject_share, num_proc=inputs.num_proc, columns=inputs.columns,
        repeated_ids=inputs.repeated_ids, split=inputs.split,
    )  # fmt: skip


def limited(dataset: Any, max_samples: int | None) -> Any:
    """The first `max_samples` of a dataset."""
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return torch.utils.data.Subset(dataset, range(max_samples))


def _padded(counts: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, size - len(counts)))
