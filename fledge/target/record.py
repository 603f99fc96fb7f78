"""What the target says about one sample: the spine between the target and everything that learns from it.

Knows tensors and their shapes. Knows nothing of who made them (a live model, a server, files) or who reads them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# T tokens, A tapped layers, H hidden size of the target, R axes of a multimodal rope


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """One sample as the target saw it."""

    sample_id: str
    input_ids: Tensor  # (T,) int64, image placeholders included
    loss_mask: Tensor  # (T,) bool, tokens the target itself wrote
    position_ids: Tensor  # (T,) or (R, T) int64, as the target used them
    tap_hidden: Tensor  # (T, A, H) inputs of the tapped decoder layers, in tap order
    last_hidden: Tensor  # (T, H) after the final norm: target logits = head(last_hidden)

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
            and self.loss_mask.dtype == torch.bool
        )
        assert good, f"record {self.sample_id}: inconsistent {shapes=}"

    def __len__(self) -> int:
        return self.input_ids.shape[0]

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


def default_tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Low, middle and high tap: inputs of decoder layers 2, N // 2 and N - 3 (EAGLE-3; vLLM and SGLang agree)."""
    return 2, num_layers // 2, num_layers - 3
