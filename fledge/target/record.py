"""What the target says about one sample: the spine between the target and everything that learns from it.

Knows tensors and their shapes. Knows nothing of who made them (a live model, a server, files) or who reads them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# T tokens, A tapped layers, H hidden size of the target, R axes of a multimodal rope

MOVED = ("input_ids", "position_ids", "tap_hidden", "last_hidden")  # where the computing is done
TapChoice = Sequence[int] | Callable[[int], Sequence[int]] | None  # a function of the number of layers; None: the usual
SUMMARY_ROWS = 256  # rows whose logits exist at a time


@dataclass(frozen=True)
class TeacherSummary:
    """What a teacher must know of the target's whole vocabulary, so that training multiplies the draft's rows alone.

    Stated where the target wrote the token itself (`loss_mask`); zero elsewhere, where nothing is taught.
    """

    argmax: Tensor  # (T,) int64 argmax of the target's logits
    logsumexp: Tensor  # (T,) fp32 logsumexp of the target's logits

    @classmethod
    @torch.no_grad()
    def of(cls, head: Callable[[Tensor], Tensor], last_hidden: Tensor, loss_mask: Tensor) -> "TeacherSummary":
        """Ask the head, which gives (.., H) -> (.., V)."""
        rows = loss_mask.nonzero()[:, 0].to(last_hidden.device, non_blocking=True)
        argmax = torch.zeros(len(loss_mask), dtype=torch.int64, device=last_hidden.device)
        logsumexp = torch.zeros(len(loss_mask), device=last_hidden.device)
        for part in rows.split(SUMMARY_ROWS):
            logits = head(last_hidden[part]).to(last_hidden.device)
            argmax[part] = logits.max(-1).indices  # several times faster than argmax on CPU
            logsumexp[part] = logits.float().logsumexp(-1)
        return cls(argmax, logsumexp)

    @classmethod
    def cat(cls, summaries: "Sequence[TeacherSummary | None]") -> "TeacherSummary | None":
        """Of records end to end; None as soon as one lacks it."""
        known = [summary for summary in summaries if summary is not None]
        if len(known) < len(summaries):
            return None
        return cls(torch.cat([one.argmax for one in known]), torch.cat([one.logsumexp for one in known]))

    def to(self, device: torch.device) -> "TeacherSummary":
        return TeacherSummary(self.argmax.to(device, non_blocking=True), self.logsumexp.to(device, non_blocking=True))

    def pin_memory(self) -> "TeacherSummary":
        return TeacherSummary(self.argmax.pin_memory(), self.logsumexp.pin_memory())

    def __getitem__(self, rows: Tensor | slice) -> "TeacherSummary":
        return TeacherSummary(self.argmax[rows], self.logsumexp[rows])


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """One sample as the target saw it."""

    sample_id: str
    input_ids: Tensor  # (T,) int64, image placeholders included
    loss_mask: Tensor  # (T,) bool, tokens the target itself wrote; on the host: it decides what there is to compute
    position_ids: Tensor  # (T,) or (R, T) int64, as the target used them
    tap_hidden: Tensor  # (T, A, H) inputs of the tapped decoder layers, in tap order
    last_hidden: Tensor  # (T, H) after the final norm: target logits = head(last_hidden)
    summary: TeacherSummary | None = None  # not known: training asks the whole head

    def __post_init__(self) -> None:
        length = self.input_ids.shape[0]
        shapes = {
            name: tuple(getattr(self, name).shape)
            for name in ("input_ids", "loss_mask", "position_ids", "tap_hidden", "last_hidden")
        }
        good = (
            self.input_ids.shape == self.loss_mask.shape == (length,)
            and self.position_ids.shape[-1:] == (length,)
            and (self.position_ids.dim() == 1 or self.position_ids.shape[:-1] in ((3,), (4,)))
            and self.tap_hidden.shape[0] == self.last_hidden.shape[0] == length
            and self.tap_hidden.shape[2] == self.last_hidden.shape[1]
            and (self.loss_mask.dtype, self.loss_mask.device.type) == (torch.bool, "cpu")
            and (self.summary is None or len(self.summary.argmax) == len(self.summary.logsumexp) == length)
        )
        assert good, f"record {self.sample_id}: inconsistent {shapes=}"

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> "TargetRecord":
        """On another device, all but the mask; copied while the host goes on."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in MOVED}
        return replace(self, **moved, summary=None if self.summary is None else self.summary.to(device))

    def pin_memory(self) -> "TargetRecord":
        """In memory that a GPU reads by itself; loaders call this."""
        pinned = {name: getattr(self, name).pin_memory() for name in MOVED}
        return replace(self, **pinned, summary=None if self.summary is None else self.summary.pin_memory())

    @property
    def rope_delta(self) -> int:
        """What the rope position of a later token is beyond its index (transformers' rope_deltas): pictures of many
        tokens take few positions. Read off the last token, which is text."""
        return int(self.position_ids[..., -1].max()) + 1 - len(self)


@dataclass(frozen=True)
class TargetOutput:
    """One forward pass of the target, without logits: call `head` on the rows that need them."""

    last_hidden: Tensor  # (B, T, H) after the final norm
    tap_hidden: Tensor | None  # (B, T, A, H)

    def first(self, num_rows: int) -> "TargetOutput":
        """Of the first tokens, the others being fillers."""
        if num_rows == self.last_hidden.shape[1]:
            return self
        taps = None if self.tap_hidden is None else self.tap_hidden[:, :num_rows]
        return TargetOutput(self.last_hidden[:, :num_rows], taps)


def default_tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Low, middle and high tap: inputs of decoder layers 2, N // 2 and N - 3, as vLLM and SGLang have them."""
    return 2, num_layers // 2, num_layers - 3


def chosen_taps(choice: TapChoice, num_layers: int) -> tuple[int, ...]:
    """The tap layers of a target of so many layers."""
    if choice is None:
        return default_tap_layers(num_layers)
    return tuple(choice(num_layers) if callable(choice) else choice)
