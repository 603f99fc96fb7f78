"""The draft vocabulary: which target tokens the draft may propose.

Knows token counts, nothing of text or models. `d2t` holds offsets (target_id = draft_id + d2t[draft_id]), `t2d` says
which target ids are in; the invariant between the two is checked wherever they come from a file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.errors import UserError

# V target vocab, D draft vocab


@dataclass(frozen=True)
class DraftVocab:
    """The chosen tokens. `coverage` is the share of supervised tokens inside: a hard ceiling on acceptance."""

    d2t: Tensor  # (D,) int64 offsets
    t2d: Tensor  # (V,) bool
    coverage: float

    @property
    def target_ids(self) -> Tensor:  # (D,) ascending
        return self.d2t + torch.arange(len(self.d2t))


def vocab_size_of(tokenizer: Any) -> int:
    """How many ids a tokenizer spans: its largest id and one, which is more than their number where ids are unused."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def count_tokens(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each id occurs. (N,) -> (V,) int64."""
    return torch.bincount(ids.long(), minlength=vocab_size)


def build_vocab(
    counts: Tensor, vocab_size: int, draft_vocab_size: int | None, always: Iterable[int] = ()
) -> DraftVocab:
    """The `draft_vocab_size` most frequent ids, `always` among them whatever their count; None keeps every id.

    Equal counts go to the lower id, so the choice depends on the counts alone.
    """
    if len(counts) > vocab_size:
        if int(counts[vocab_size:].sum()):
            raise UserError(
                f"the data holds token id {int(counts.nonzero()[-1])}, the target's vocabulary ends at "
                f"{vocab_size - 1}: the data was tokenised for another model. Tokenise it with this target's tokenizer."
            )
        counts = counts[:vocab_size]
    counts = torch.nn.functional.pad(counts.long(), (0, vocab_size - len(counts)))
    size = vocab_size if draft_vocab_size is None else min(draft_vocab_size, vocab_size)
    kept = torch.tensor(sorted(set(always)), dtype=torch.int64)
    if size < 1 or len(kept) > size:
        raise UserError(
            f"draft_vocab_size={draft_vocab_size} is too small: {len(kept)} stop and control tokens always belong to "
            f"it. Raise it (32000 is usual)."
        )
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < vocab_size:
        raise UserError(f"control token id {int(kept.max())} is outside the target's vocabulary of {vocab_size}.")
    rank = counts.clone()
    rank[kept] = counts.max() + 1
    target_ids = rank.argsort(descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    total = int(counts.sum())
    return DraftVocab(target_ids - torch.arange(size), t2d, int(counts[t2d].sum()) / total if total else 0.0)


def coverage(counts: Tensor, sizes: Sequence[int], always: Iterable[int] = ()) -> dict[int, float]:
    """The coverage each draft vocabulary size would have; sizes beyond the vocabulary cover everything."""
    always = tuple(always)
    return {size: build_vocab(counts, len(counts), max(size, len(always)), always).coverage for size in sizes}


def control_ids(counts: Tensor, special_ids: Iterable[int], stop_ids: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids the draft must be able to say: where generation stops, and special tokens the assistant does write."""
    written = {id for id in special_ids if id < len(counts) and int(counts[id]) > 0}
    return tuple(sorted(written | set(stop_ids)))


def check_vocab(d2t: Tensor, t2d: Tensor, source: str = "draft vocabulary") -> None:
    """`nonzero(t2d) == d2t + arange(D)`, or an error that says where the two disagree."""
    if d2t.ndim != 1 or t2d.ndim != 1 or d2t.dtype not in (torch.int64, torch.int32) or t2d.dtype != torch.bool:
        raise UserError(
            f"{source}: d2t is {d2t.dtype} {tuple(d2t.shape)} and t2d {t2d.dtype} {tuple(t2d.shape)}; needed are "
            f"int64 (D,) and bool (V,). Rebuild the head's vocabulary."
        )
    inside = t2d.nonzero().flatten()
    if len(inside) != len(d2t):
        raise UserError(
            f"{source}: d2t names {len(d2t)} tokens, t2d {len(inside)}. They come from different vocabularies: "
            f"take both from the same checkpoint or rebuild them."
        )
    target_ids = d2t.long() + torch.arange(len(d2t), device=d2t.device)
    wrong = (target_ids != inside.to(d2t.device)).nonzero().flatten()
    if len(wrong):
        draft_id = int(wrong[0])
        raise UserError(
            f"{source}: draft id {draft_id} maps to target id {int(target_ids[draft_id])} by d2t but to "
            f"{int(inside[draft_id])} by t2d ({len(wrong)} of {len(d2t)} differ). d2t must hold offsets "
            f"(target id minus draft id) in ascending order of target ids; rebuild the head's vocabulary."
        )
