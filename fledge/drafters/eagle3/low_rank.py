"""A head of two thin factors while training: logits = up(down(h)), D x r and r x H instead of D x H.

Fewer weights to multiply, step and keep moments of; the wider the vocabulary, the more is spared. Engines know nothing
of it: whatever is saved as a head holds the product as `lm_head.weight`, and only checkpoints for resuming keep the
factors beside it.
"""

import torch
from torch import Tensor, nn

from fledge.errors import UserError

# D draft vocab, H hidden, r rank
UP, DOWN, WHOLE = "lm_head.up.weight", "lm_head.down.weight", "lm_head.weight"
FACTORS = "head_factors.safetensors"  # beside a checkpoint's model.safetensors


class LowRankHead(nn.Module):
    """Stands where `lm_head` stood; `weight` is the product."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)

    @classmethod
    def of(cls, weight: Tensor, rank: int) -> "LowRankHead":
        """The best factors for a weight (D, H), with equal scales on both sides."""
        vocab_size, hidden_size = weight.shape
        if not 0 < rank <= hidden_size:
            raise UserError(f"--head_rank {rank} must lie in 1..{hidden_size}, the hidden size.")
        head = cls(hidden_size, rank, vocab_size).to(weight.device)
        head.factorise(weight)
        return head

    @torch.no_grad()
    def factorise(self, weight: Tensor) -> None:
        """Take the leading singular vectors of `weight` (D, H), found from its H x H Gram matrix."""
        squares, vectors = torch.linalg.eigh(weight.double().T @ weight.double())  # ascending
        rank = self.down.weight.shape[0]
        basis = vectors[:, -rank:].T  # (r, H) rows: right singular vectors
        scale = squares[-rank:].clamp_min(1e-12).pow(0.25)[:, None]  # sqrt of the singular values
        self.down.weight.copy_(basis * scale)
        self.up.weight.copy_(weight.double() @ (basis / scale).T)

    @property
    def weight(self) -> Tensor:
        """(D, H)"""
        return self.up.weight @ self.down.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(self.down(hidden))


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named weights with the factors, where there are any, replaced by their product."""
    if UP not in weights:
        return weights
    product = weights[UP].float() @ weights[DOWN].float()
    return {name: weight for name, weight in weights.items() if name not in (UP, DOWN)} | {WHOLE: product}


def factors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two factors alone, as a checkpoint keeps them."""
    return {name: weights[name].detach().float().cpu().contiguous() for name in (UP, DOWN)}
