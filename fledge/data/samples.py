"""One training sequence: token ids, the mask of what the assistant wrote, the pictures among the tokens.

Knows offsets, spans and lengths; knows no tokenizer and no template. Here a text's encoding becomes a sample, rows that
already hold token ids become one, and samples are cut to length.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.data.conversations import ANSWER_MARK, Conversation
from fledge.data.images import ImageRef, Picture
from fledge.data.rejects import Reject
from fledge.errors import UserError

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # model inputs that say something about each token, (1, T)
MIN_SUPERVISED = 2  # the first trained row needs the token it predicts from and the token it predicts
TURN_MARK = "#turn"
IGNORED_LABEL = -100  # transformers' label of a token that is not supervised


class Drop(Reject):
    """A sound row that has nothing to train on at this length; counted apart from rejected ones."""

    def __reduce__(self):
        return Drop, (self.reason, self.detail)


@dataclass(frozen=True)
class Sample:
    """One training sequence: token ids, and True on the tokens the assistant wrote (end of turn included)."""

    id: str
    input_ids: Tensor  # (T,) int64
    loss_mask: Tensor  # (T,) bool
    truncated: bool = False
    num_cut: int = 0  # supervised tokens lost by truncation
    images: tuple[ImageRef, ...] = ()  # the pictures among its tokens
    untraced: tuple[str, ...] = ()  # fields of its row that the template did not render; on the row's first sample
    model_inputs: dict[str, Tensor] = field(default_factory=dict)  # pixels and the like, once somebody loaded them

    def ends_with(self, token_ids: Sequence[int]) -> bool:
        """Whether the last supervised token is one of these: those at which the target stops, say."""
        return self.input_ids[self.loss_mask][-1:].tolist() in [[id] for id in token_ids]


@dataclass(frozen=True)
class Prompt:
    """What generation is fed: token ids, and whatever the target takes beside them."""

    ids: list[int]
    model_inputs: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, token_ids: Sequence[int]) -> "Prompt":
        """The prompt with text behind it."""
        more = {
            key: torch.nn.functional.pad(value, (0, len(token_ids))) if key in PER_TOKEN else value
            for key, value in self.model_inputs.items()
        }
        return Prompt([*self.ids, *token_ids], more)

    def until(self, end: int) -> "Prompt":
        """Its first tokens; all of its pictures must be among them."""
        less = {key: value[:, :end] if key in PER_TOKEN else value for key, value in self.model_inputs.items()}
        return Prompt(self.ids[:end], less)


def conversation_id(sample_id: str) -> str:
    """The conversation a sample came from (a split-off turn and a further answer carry marks in their ids)."""
    return re.sub(rf"({ANSWER_MARK}\d+)+$", "", sample_id.partition(TURN_MARK)[0])


@dataclass(frozen=True)
class Text:
    """A text to tokenise, with what the assistant wrote and the pictures in it, by characters."""

    id: str
    text: str
    spans: tuple[tuple[int, int], ...]
    pictures: tuple[tuple[Picture, tuple[int, int]], ...] = ()
    expected_ids: list[int] = field(default_factory=list)

    def sample(self, encoding: Any) -> Sample:
        """The sample of this text's encoding."""
        ids, mask = torch.tensor(encoding.ids), torch.from_numpy(token_mask(encoding.offsets, self.spans))
        if self.expected_ids and self.expected_ids != encoding.ids:
            raise UserError(
                f"sample {self.id!r}: the processor tokenises its text into {len(self.expected_ids)} tokens, the "
                f"tokenizer into {len(encoding.ids)} others. fledge needs a processor that uses its tokenizer as it is."
            )
        images = tuple(
            ImageRef(
                picture.source, picture.digest, *picture.image.size, *token_range(encoding.offsets, *span)
            )
            for picture, span in self.pictures
        )  # fmt: skip
        return Sample(self.id, ids, mask, images=images)


def token_range(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """(first, after the last) of the tokens that have a character in begin:end."""
    starts, ends = np.asarray(offsets, dtype=np.int64).T
    inside = np.flatnonzero((starts < end) & (ends > begin))
    return int(inside[0]), int(inside[-1]) + 1


def token_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """True on tokens whose characters lie inside a span. Several tokens of one character (bytes) share its offsets."""
    mask = np.zeros(len(offsets), dtype=bool)
    if not len(offsets):
        return mask
    starts, ends = np.asarray(offsets, dtype=np.int64).T
    for first, last in spans:
        mask |= (starts >= first) & (ends <= last) & (starts < last)
    return mask


def last_run(mask: Tensor) -> Tensor:
    """The mask of the last run of supervised tokens: the last turn of a sequence."""
    begins = mask & ~torch.cat([mask.new_zeros(1), mask[:-1]])
    return mask & (begins.int().cumsum(0) == begins.sum())


def sample_from_token_ids(conversation: Conversation, vocab_size: int) -> Sample | None:
    """A row that already has its ids: prompt_token_ids + token_ids, or input_ids with loss_mask or labels.

    Columns may be lists of one list, as tensors of a batch of one are saved. Labels are those of transformers: the id
    where a token is supervised, -100 where it is not. Where attention_mask is 0 there is padding, which is left out.
    """
    meta = conversation.meta
    prompt = _first(meta, "prompt_token_ids", "prompt_ids")
    answer = _first(meta, "token_ids", "completion_token_ids", "completion_ids")
    whole = _first(meta, "input_ids", "token_ids")
    if prompt is not None and answer is not None:
        ids, flags = [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)
    elif whole is not None and (mask := _supervised(meta, whole)) is not None:
        ids, flags = _without_padding(meta, whole, mask)
    elif conversation.messages:
        return None
    else:
        raise Reject("bad token ids", "token ids need prompt_token_ids, loss_mask or labels beside them")
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
            raise Reject("bad token ids", f"token id {id!r} is outside this tokenizer's vocabulary of {vocab_size}")
    return Sample(conversation.id, torch.tensor(ids, dtype=torch.int64), torch.tensor(flags, dtype=torch.bool))


def _supervised(meta: dict[str, Any], ids: list[Any]) -> list[bool] | None:
    """Which tokens are supervised, from loss_mask or labels; None without either."""
    masks: list[list[bool]] = []
    if (mask := _first(meta, "loss_mask")) is not None:
        _same_length(ids, mask, "loss_mask")
        if wrong := [value for value in mask if value not in (0, 1)]:
            raise Reject("bad token ids", f"loss_mask holds {wrong[0]!r}; it is 1 where a token is supervised, else 0")
        masks.append([bool(value) for value in mask])
    if (labels := _first(meta, "labels")) is not None:
        _same_length(ids, labels, "labels")
        for position, (id, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (id, IGNORED_LABEL):
                raise Reject("bad token ids", f"label {label!r} at {position} is neither its token {id!r} nor -100")
        masks.append([label != IGNORED_LABEL for label in labels])
    if len(masks) == 2 and masks[0] != masks[1]:
        raise Reject("fields contradict", "loss_mask and labels supervise different tokens: keep one of them")
    return masks[0] if masks else None


def _without_padding(meta: dict[str, Any], ids: list[Any], mask: list[bool]) -> tuple[list[Any], list[bool]]:
    """Ids and mask without what attention_mask says is padding, which is at one or both ends."""
    attended = _first(meta, "attention_mask")
    if attended is None:
        return ids, mask
    _same_length(ids, attended, "attention_mask")
    kept = [position for position, value in enumerate(attended) if value]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise Reject("bad token ids", "attention_mask is 0 between tokens; only padding at the ends can be left out")
    return [ids[position] for position in kept], [mask[position] for position in kept]


def _same_length(ids: list[Any], values: list[Any], name: str) -> None:
    if len(ids) != len(values):
        raise Reject("bad token ids", f"{len(ids)} token ids but {len(values)} entries of {name}")


def fit(sample: Sample, max_length: int | None, min_supervised: int = MIN_SUPERVISED) -> Sample:
    """Cut a sample to `max_length`, saying so; Drop when fewer than `min_supervised` supervised tokens are left."""
    supervised = int(sample.loss_mask.sum())
    if max_length is not None and len(sample.input_ids) > max_length:
        # half a picture cannot be fed: what begins before the end and does not end there goes whole
        max_length = min([max_length, *(image.begin for image in sample.images if image.end > max_length)])
        mask = sample.loss_mask[:max_length]
        left = int(mask.sum())
        sample = replace(
            sample, input_ids=sample.input_ids[:max_length], loss_mask=mask, truncated=True, num_cut=supervised - left,
            images=tuple(image for image in sample.images if image.end <= max_length),
        )  # fmt: skip
        if left < min_supervised <= supervised:
            raise Drop("cut off", f"{left} of {supervised} supervised tokens lie within the first {max_length} tokens")
        supervised = left
    if supervised < min_supervised:
        raise Drop("too short", f"{supervised} supervised tokens, at least {min_supervised} are needed")
    return sample


def fit_all(result: list[Sample] | Reject, max_length: int | None, min_supervised: int) -> list[Sample] | Reject:
    """`fit` for each sample of a conversation; those that fall away are missed only when none is left."""
    if isinstance(result, Reject):
        return result
    fitted: list[Sample] = []
    dropped: Drop | None = None
    for sample in result:
        try:
            fitted.append(fit(sample, max_length, min_supervised))
        except Drop as drop:
            dropped = drop
    return fitted or dropped or Drop("too short", "it has no supervised tokens")


def _first(meta: dict[str, Any], *names: str) -> list[Any] | None:
    """The first of these columns that is a list; a list of one list is that list."""
    for name in names:
        value = meta.get(name)
        if isinstance(value, (list, tuple)):
            return list(value[0]) if len(value) == 1 and isinstance(value[0], (list, tuple)) else list(value)
    return None
