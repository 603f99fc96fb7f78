"""What every trained draft is bound to: the target's embedding, its vocabulary and its positions.

Knows nothing of the network in between, but that it has a final `norm`, whose dtype and device are the draft's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.drafters.layer_config import LayerConfig
from fledge.drafters.layers import RMSNorm
from fledge.drafters.rope import as_index, axis_of_dims, num_axes, pick_axis
from fledge.target.model import Target

# H hidden, D draft vocab, V target vocab


class BoundHead(nn.Module):
    """A draft bound to the target's embedding."""

    needs_host = takes_no_time = False
    owns_embedding = False
    norm: RMSNorm
    axis_of_dim: Tensor | None  # (R,) axis of a multimodal rope that each dimension follows
    d2t: Tensor  # (D,) int64 offsets: target_id = draft_id + d2t[draft_id]
    t2d: Tensor  # (V,) bool: v is in the draft vocabulary

    def __init__(self, config: LayerConfig, embedding: Tensor) -> None:
        """`embedding` (V, H) is the target's, shared, frozen and never saved, unless `own_embedding` is bound."""
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = config
        self.rotary = LlamaRotaryEmbedding(config.rotary_config())
        self.rope_axes = num_axes(config.rope_parameters)
        axes = as_index(axis_of_dims(config.rope_parameters, 2 * self.rotary.inv_freq.shape[0]))
        self.register_buffer("axis_of_dim", axes, persistent=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.bind_embedding(embedding)

    def document(self, dtype: str) -> dict[str, Any]:
        """config.json beside weights in this dtype."""
        raise NotImplementedError

    def fresh(self, target: Target) -> "BoundHead":
        """An untrained one of the same config, bound to this target."""
        raise NotImplementedError

    def bind_embedding(self, embedding: Tensor) -> None:
        """Share the target's embedding (V, H). Not a parameter: neither trained, saved nor moved with the head."""
        assert embedding.shape[1] == self.config.hidden_size, f"{embedding.shape=} {self.config.hidden_size=}"
        self._embedding = [embedding.detach()]  # in a list, so that nn.Module does not register it

    def own_embedding(self, embedding: Tensor) -> None:
        """Read this embedding (V, H) instead of the target's: the head brings it, stays with it and saves it."""
        self.bind_embedding(embedding)
        self.owns_embedding = True

    @property
    def embedding(self) -> Tensor:
        return self._embedding[0]

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return tuple(self.config.tap_layers)

    @property
    def devices(self) -> frozenset[torch.device]:
        return frozenset({self.norm.weight.device})

    def embed(self, token_ids: Tensor) -> Tensor:
        """(..) target ids -> (.., H) in the head's dtype."""
        table = self.embedding
        return F.embedding(token_ids.to(table.device), table).to(self.norm.weight.device, self.norm.weight.dtype)

    def set_vocab(self, d2t: Tensor, t2d: Tensor) -> None:
        """Fix which target tokens the head may propose."""
        self.d2t.copy_(d2t)
        self.t2d.copy_(t2d)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft vocabulary ids (..) to target ids (..)."""
        return draft_ids + self.d2t[draft_ids]

    def rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (.., R) for positions (..); R <= head_dim where the target rotates only a part.

        A head with a multimodal rope takes positions (axes, N), one row per axis, or (N,) where all axes agree (text).
        """
        shape = position_ids.shape
        like = self.norm.weight  # dtype and device of the result
        cos, sin = self.rotary(like, position_ids.reshape(1, -1))
        cos, sin = (part.reshape(*shape, part.shape[-1]) for part in (cos, sin))
        if self.axis_of_dim is None or position_ids.dim() == 1:
            return cos, sin
        assert shape[0] == self.rope_axes, f"{shape=}, a rope of {self.rope_axes} axes"
        return pick_axis(cos, self.axis_of_dim), pick_axis(sin, self.axis_of_dim)
