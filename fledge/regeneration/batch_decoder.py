"""Batched decoding of many independent prompts with a stock transformers model.

Knows token ids, the model's forward and its cache. Knows nothing of text, rows or files. Rows join and leave while the
others go on. All rows end at the same cache column, so a row that joins is padded on the left:

    columns   0 1 2 3 4 5 | next
    row a     . . p p o o | o       p prompt, o answer so far, . padding (masked)
    row b     p p p p p o | o
    row c     . . . . p p | o       joined just now

Three things make it quick on a CPU: the cache grows in steps instead of being copied for every token, prompts are
prefilled in groups of similar length, and finished rows are replaced once an eighth of the batch is free (replacing
copies the cache, so not at every single one).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fledge.data.sampling import ExtraSampling
from fledge.target.model import cache_argument

# B rows, L cache columns, V vocabulary

PREFILL_TOKENS = 2048  # padded tokens of one prefill group
GROW_BY = 128
TOP_P_CANDIDATES = 1024


@dataclass
class DecodingJob:
    """One prompt, how to answer it, and the answer as it grows."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    tag: Any = None
    extra: ExtraSampling = ExtraSampling()
    output_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def __post_init__(self) -> None:
        self.draws = random.Random(self.seed)
        self.seen: Tensor | None = None  # (V,) bool, the tokens of prompt and answer; only with a repetition penalty


@dataclass
class _Part:
    """Rows that share a cache: `mask` is (B, L), 1 on real columns."""

    jobs: list[DecodingJob]
    cache: DynamicCache
    mask: Tensor


class GrowingLayer(DynamicLayer):
    """Keys and values with room to grow, so that a token is written, not everything copied."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.take(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        keys, values = (
            self._append("_key_room", self.keys, key_states),
            self._append("_value_room", self.values, value_states),
        )
        self.keys, self.values = keys, values
        return keys, values

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Hold exactly these."""
        self.keys, self.values = keys, values
        self._key_room, self._value_room = keys, values

    def _append(self, room_name: str, old: Tensor, new: Tensor) -> Tensor:
        room, length = getattr(self, room_name), old.shape[-2] + new.shape[-2]
        if length > room.shape[-2]:
            room = old.new_zeros(*old.shape[:-2], length + GROW_BY, old.shape[-1])
            room[..., : old.shape[-2], :] = old
            setattr(self, room_name, room)
        room[..., old.shape[-2] : length, :] = new
        return room[..., :length, :]


class BatchDecoder:
    """At most `batch_size` rows at once; `admit` jobs, then `step` until they come out finished."""

    def __init__(self, model: Any, *, eos_token_ids: Sequence[int], batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.device = model.device
        self._eos = frozenset(eos_token_ids)
        self._part: _Part | None = None

    def live_jobs(self) -> list[DecodingJob]:
        return [job for job in self._part.jobs if job.finish_reason is None] if self._part else []

    @property
    def num_live(self) -> int:
        return len(self.live_jobs())

    @property
    def num_free(self) -> int:
        return self.batch_size - self.num_live

    def wants_more(self) -> bool:
        """Whether enough places are free to be worth a merge."""
        return self.num_live == 0 or self.num_free >= max(self.batch_size // 8, 1)

    @torch.inference_mode()
    def admit(self, jobs: Sequence[DecodingJob]) -> list[DecodingJob]:
        """Prefill these and let them join. Returns those that are finished with their first token."""
        parts = [self._prefill(group) for group in prefill_groups(jobs)]
        if self._part:
            parts.append(self._part)
        self._part = self._merge(parts)
        return [job for job in jobs if job.finish_reason]

    @torch.inference_mode()
    def step(self) -> list[DecodingJob]:
        """One token for every row. Returns the rows that finished with it."""
        part = self._part
        if part is None:
            return []
        if len(part.jobs) - self.num_live > len(part.jobs) // 4:
            part = self._part = self._merge([part])
            if part is None:
                return []
        live = [job for job in part.jobs if job.finish_reason is None]
        ids = torch.tensor([[job.output_ids[-1]] for job in part.jobs], device=self.device)
        positions = part.mask.sum(1, keepdim=True)
        part.mask = torch.cat([part.mask, part.mask.new_ones(len(part.jobs), 1)], dim=1)
        self._emit(part.jobs, self._forward(ids, part.mask, positions, part.cache))
        return [job for job in live if job.finish_reason]

    def _prefill(self, jobs: list[DecodingJob]) -> _Part:
        width = max(len(job.prompt_ids) for job in jobs)
        ids = torch.tensor([[0] * (width - len(job.prompt_ids)) + job.prompt_ids for job in jobs], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(job.prompt_ids)) + [1] * len(job.prompt_ids) for job in jobs], device=self.device
        )
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        self._emit(jobs, self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache))
        return _Part(jobs, cache, mask)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) of the last position."""
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{cache_argument(self.model): cache},
        )  # fmt: skip
        return out.logits[:, -1].float()

    def _emit(self, jobs: list[DecodingJob], logits: Tensor) -> None:
        """Give every live row its next token (a finished one keeps its last until it is replaced)."""
        live = [index for index, job in enumerate(jobs) if job.finish_reason is None]
        if not live:
            return
        alive = [jobs[index] for index in live]
        chosen = sample(
            repetition_penalised(logits if len(live) == len(jobs) else logits[live], alive),
            [job.temperature for job in alive],
            [job.top_p for job in alive],
            [job.draws.random() for job in alive],
            [job.extra for job in alive],
        )
        for index, token in zip(live, chosen, strict=True):
            job = jobs[index]
            job.output_ids.append(token)
            if token in self._eos:
                job.finish_reason = "stop"
            elif len(job.output_ids) >= job.max_new_tokens:
                job.finish_reason = "length"

    def _merge(self, parts: list[_Part]) -> _Part | None:
        """The live rows of all parts in one cache, as narrow as its longest row."""
        kept = [(part, [i for i, job in enumerate(part.jobs) if job.finish_reason is None]) for part in parts]
        kept = [(part, rows) for part, rows in kept if rows]
        if not kept:
            return None
        widths = [int(part.mask[rows].sum(1).max()) for part, rows in kept]
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        for layer in range(len(kept[0][0].cache.layers)):
            layers: list[tuple[Any, list[int]]] = [(part.cache.layers[layer], rows) for part, rows in kept]
            keys = _stack([(each.keys, rows) for each, rows in layers], widths)
            values = _stack([(each.values, rows) for each, rows in layers], widths)
            cache.update(keys, values, layer)
            for each, _ in layers:
                each.take(keys[:0], values[:0])  # let go of it before the next layer is copied
        masks = [(part.mask[:, None, :, None], rows) for part, rows in kept]
        mask = _stack(masks, widths)[:, 0, :, 0]
        return _Part([part.jobs[row] for part, rows in kept for row in rows], cache, mask)


def _stack(pieces: Sequence[tuple[Tensor, list[int]]], widths: Sequence[int]) -> Tensor:
    """Rows of several (B, h, L, d) tensors below each other, right-aligned: the last `width` columns of each."""
    first = pieces[0][0]
    out = first.new_zeros(sum(len(rows) for _, rows in pieces), first.shape[1], max(widths), first.shape[3])
    row = 0
    for (tensor, rows), width in zip(pieces, widths, strict=True):
        out[row : row + len(rows), :, max(widths) - width : max(widths)] = tensor[rows, :, tensor.shape[2] - width :]
        row += len(rows)
    return out


def prefill_groups(jobs: Sequence[DecodingJob]) -> list[list[DecodingJob]]:
    """Jobs of similar length together, each group at most PREFILL_TOKENS when padded (a longer prompt goes alone)."""
    groups: list[list[DecodingJob]] = []
    for job in sorted(jobs, key=lambda job: len(job.prompt_ids)):
        if groups and len(job.prompt_ids) * (len(groups[-1]) + 1) <= PREFILL_TOKENS:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def repetition_penalised(logits: Tensor, jobs: Sequence[DecodingJob]) -> Tensor:
    """(B, V) logits with every token that a row already holds made less likely, where the row asks for it."""
    rows = [row for row, job in enumerate(jobs) if job.extra.repetition_penalty not in (None, 1.0)]
    if not rows:
        return logits
    for job in (jobs[row] for row in rows):
        if job.seen is None:
            job.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            job.seen[[*job.prompt_ids, *job.output_ids]] = True
        job.seen[job.output_ids[-1:]] = True
    seen = torch.stack([jobs[row].seen for row in rows])  # type: ignore[misc]  # set just above
    penalty = torch.tensor([[jobs[row].extra.repetition_penalty] for row in rows], device=logits.device)
    chosen = logits[rows]
    weaker = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    logits = logits.clone()
    logits[rows] = torch.where(seen, weaker, chosen)
    return logits


def sample(
    logits: Tensor, temperatures: list[float], top_ps: list[float], draws: list[float],
    extras: Sequence[ExtraSampling] | None = None,
) -> list[int]:  # fmt: skip
    """One token per row of (B, V) logits: the argmax at temperature 0, else by inverse CDF from the row's own draw."""
    chosen = logits.argmax(dim=-1)
    warm = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if not warm:
        return chosen.tolist()
    scale = torch.tensor([temperatures[row] for row in warm], device=logits.device)
    probabilities = torch.softmax(logits[warm] / scale[:, None], dim=-1)
    place = torch.tensor([draws[row] for row in warm], dtype=torch.float32, device=logits.device)
    for number, row in enumerate(warm):
        extra = extras[row] if extras else ExtraSampling()
        if extra.top_k:
            probabilities[number] = top_k_of(probabilities[number], extra.top_k)
        if top_ps[row] < 1:
            probabilities[number] = nucleus(probabilities[number], top_ps[row])
        if extra.min_p:
            probabilities[number] *= probabilities[number] >= extra.min_p * probabilities[number].max()
    cumulative = probabilities.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, (place * cumulative[:, -1])[:, None], right=True)[:, 0]
    chosen[warm] = picked.clamp(max=logits.shape[-1] - 1)
    return chosen.tolist()


def top_k_of(probabilities: Tensor, top_k: int) -> Tensor:
    """The (V,) distribution of its `top_k` most likely tokens, every one as likely as the last of them included."""
    least = probabilities.topk(min(top_k, len(probabilities))).values[-1]
    kept = probabilities * (probabilities >= least)
    return kept / kept.sum()


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The (V,) distribution with everything outside the smallest set of mass >= top_p zeroed (not renormalised)."""
    count = min(TOP_P_CANDIDATES, len(probabilities))
    values, ids = probabilities.topk(count)
    if values.sum() < top_p:
        values, ids = probabilities.sort(descending=True)
    before = values.cumsum(0) - values
    keep = before < top_p
    return torch.zeros_like(probabilities).scatter_(0, ids[keep], values[keep])
