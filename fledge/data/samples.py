"""One training sequence: token ids, the mask of what the assistant wrote, the pictures among the tokens.

Knows offsets, spans and lengths; knows no tokenizer and no template. Here a text's encoding becomes a sample, rows that
already hold token ids become one, and samples are cut to length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.data.conversations import Conversation
from fledge.data.images import ImageRef, Picture
from fledge.data.rejects import Reject
from fledge.errors import UserError

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # model inputs that say something about each token, (1, T)
MIN_SUPERVISED = 2  # the first trained row needs the token it predicts from and the token it predicts
TURN_MARK = "#turn"


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
    model_inputs: dict[str, Tensor] = field(default_factory=dict)  # pixels and the like, once somebody loaded them


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
    """The conversation a sample came from (a split-off turn carries a mark in its id)."""
    return sample_id.partition(TURN_MARK)[0]


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


def sample_from_token_ids(conversation: Conversation, vocab_size: int) -> Sample | None:
    """A row that already has its ids: prompt_token_ids + token_ids, or token_ids / input_ids + loss_mask."""
    meta = conversation.meta
    prompt = _first(meta, "prompt_token_ids", "prompt_ids")
    answer = _first(meta, "token_ids", "completion_token_ids", "completion_ids")
    whole, mask = _first(meta, "input_ids", "token_ids"), meta.get("loss_mask")
    if prompt is not None and answer is not None:
        ids, flags = [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)
    elif whole is not None and mask is not None:
        ids, flags = list(whole), [bool(flag) for flag in mask]
        if len(ids) != len(flags):
            raise Reject("bad token ids", f"{len(ids)} token ids but {len(flags)} entries of loss_mask")
    elif conversation.messages:
        return None
    else:
        raise Reject("bad token ids", "token ids need prompt_token_ids or loss_mask beside them")
    wrong = next((t for t in ids if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise Reject("bad token ids", f"token id {wrong!r} is outside this tokenizer's vocabulary of {vocab_size}")
    return Sample(conversation.id, torch.tensor(ids, dtype=torch.int64), torch.tensor(flags, dtype=torch.bool))


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


def _first(meta: dict[str, Any], *names: str) -> Any:
    return next((meta[name] for name in names if isinstance(meta.get(name), (list, tuple))), None)
