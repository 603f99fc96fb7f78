"""The block draft: DFlash's network, with DSpark's Markov and confidence heads where the config has them.

    c      = RMSNorm_hidden(fc([tap_1 | .. | tap_A]))          one vector per committed position, for all layers
    block  = [x_p, M, .., M]                                   the anchor and mask tokens at positions p .. p + B - 1
    h'     = h + Attention(RMSNorm_input(h))                   queries of the block only; keys and values of the context
                                                               (from c, not normed again) and of the block
    h''    = h' + SwiGLU(RMSNorm_post(h'))                     Qwen3's layer: q and k are normed by head, then rotated
    logits = lm_head(RMSNorm_norm(h''))                        the target's own head, frozen
             + w2 w1[token before]                             Markov head: ties the slots of a block together

The context of a block are the positions *before* its anchor, whose own states do not exist yet when it is drafted from.
Module names are the checkpoint's names. The same module trains, exports and decodes; it knows nothing of trees, losses
or files.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fledge.drafters.bound_head import BoundHead
from fledge.drafters.cpu_kernels import linear, through
from fledge.drafters.dspark.config import BlockConfig, to_json
from fledge.drafters.layer_cache import KeysValues
from fledge.drafters.layers import RMSNorm, SwiGLU, rotate
from fledge.target.linear import head_linear
from fledge.target.model import Target

# leading dims "..": any batch shape; H hidden, A taps, D draft vocab, V target vocab, L layers, r Markov rank
# h heads, g kv heads, d head_dim, B slots of a block

Rope = tuple[Tensor, Tensor]
MARKOV_STD = 0.01  # of a fresh Markov embedding


class Attend(Protocol):
    """Attention of a block: queries (.., B, h, d), own keys and values (.., B, g, d) and the layer's number."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor: ...


class SlotAttention(nn.Module):
    """Projections and norms by head; the attention itself differs between training and decoding."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.head_dim = head_dim

    def queries(self, states: Tensor, rope: Rope) -> Tensor:
        """(.., H) -> (.., h, d)"""
        q = through(self.q_proj, states).unflatten(-1, (-1, self.head_dim))
        return rotate(self.q_norm(q), *rope)

    def keys_values(self, states: Tensor, rope: Rope) -> KeysValues:
        """(.., H) -> twice (.., g, d)"""
        k = through(self.k_proj, states).unflatten(-1, (-1, self.head_dim))
        v = through(self.v_proj, states).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(k), *rope), v


class BlockLayer(nn.Module):
    """One decoder layer of Qwen3."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SlotAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)


class MarkovHead(nn.Module):
    """Log-odds of a token by the token before it, of low rank."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=MARKOV_STD)


class ConfidenceHead(nn.Module):
    """The logit of a draft's acceptance."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + config.markov_rank, 1)


class BlockDraft(BoundHead):
    """A block draft bound to the target's embedding and head."""

    config: BlockConfig

    def __init__(self, config: BlockConfig, embedding: Tensor, target_head: Tensor) -> None:
        """`embedding` and `target_head` (V, H) are the target's, shared and frozen.

        With a whole vocabulary the head is never saved; a smaller one is a copy of the target's rows.
        """
        super().__init__(config, embedding)
        size = config.hidden_size
        self.fc = nn.Linear(len(config.tap_layers) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.confidence else None
        self._target_head = [target_head.detach()]  # in a list, so that nn.Module does not register it
        if not config.full_vocab:
            self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
            self.lm_head.requires_grad_(False)

    def document(self, dtype: str) -> dict[str, Any]:
        return to_json(self.config, dtype=dtype)

    def fresh(self, target: Target) -> "BlockDraft":
        return BlockDraft(self.config, target.embedding_weight, target.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(D, H) rows of the draft vocabulary."""
        return self._target_head[0] if self.config.full_vocab else self.lm_head.weight

    @torch.no_grad()
    def warm_start_head(self) -> None:
        """The target's rows of the draft vocabulary, where it is not whole."""
        if not self.config.full_vocab:
            rows, table = self.target_ids(torch.arange(self.config.draft_vocab_size)), self._target_head[0]
            self.lm_head.weight.copy_(table[rows.to(table.device)])

    @torch.no_grad()
    def warm_start(self, tap_hidden: Tensor) -> None:
        """Start where the target's states are: head rows, and a few hundred rows of taps (N, A, H).

        fc passes the highest tap on, with the others mixed in weakly; hidden_norm takes its size away. The final norm
        starts low, so that the first logits are unsure (standard deviation 1.25): through the target's rows an
        untrained state is confident and wrong.
        """
        self.warm_start_head()
        size = self.config.hidden_size
        self.fc.weight.mul_(0.1)
        self.fc.weight[:, -size:] += torch.eye(size, device=self.fc.weight.device)
        fused = linear(tap_hidden.to(self.fc.weight).flatten(-2), self.fc.weight)
        self.fc.weight.div_(fused.float().pow(2).mean(-1).sqrt().median().clamp_min(1e-6))
        row_norm = self.head_weight.float().norm(dim=-1).median()
        self.norm.weight.fill_(min(1.0, 1.25 / max(float(row_norm), 1e-6)))

    def block_inputs(self, anchors: Tensor) -> Tensor:
        """Anchor tokens (..) to the input states of their blocks (.., B, H)."""
        tokens = anchors[..., None].expand(*anchors.shape, self.config.block_size)
        slots = torch.arange(self.config.block_size, device=anchors.device)
        return self.embed(torch.where(slots == 0, tokens, self.config.mask_token_id))

    def context(self, tap_hidden: Tensor) -> Tensor:
        """Target states (.., A, H) to c (.., H)."""
        taps = tap_hidden.to(self.fc.weight.device, self.norm.weight.dtype)
        return self.hidden_norm(through(self.fc, taps.flatten(-2)))

    def context_keys(self, context: Tensor, rope: Rope) -> list[KeysValues]:
        """c (.., H) to the keys and values (.., g, d) of every layer."""
        return [layer.self_attn.keys_values(context, rope) for layer in self._layers]

    def forward_block(self, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Input states of blocks (.., B, H) to normed states (.., B, H). `rope`: of the slots' positions."""
        for number, layer in enumerate(self._layers):
            normed = layer.input_layernorm(hidden)
            attended = attend(
                layer.self_attn.queries(normed, rope), *layer.self_attn.keys_values(normed, rope), number
            )  # fmt: skip
            hidden = hidden + through(layer.self_attn.o_proj, attended.flatten(-2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.norm(hidden)

    @property
    def _layers(self) -> Sequence[BlockLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def logits(self, normed: Tensor) -> Tensor:
        """Normed states (.., H) to the logits (.., D) before the Markov head."""
        return head_linear(normed, self.head_weight.to(normed.dtype))

    def markov_states(self, token_ids: Tensor) -> Tensor:
        """The Markov embedding (.., r) of target ids (..)."""
        assert self.markov_head is not None
        return self.markov_head.markov_w1(token_ids)

    def markov_logits(self, token_ids: Tensor) -> Tensor:
        """What a token before adds to the logits: target ids (..) -> (.., D)."""
        assert self.markov_head is not None
        return head_linear(self.markov_states(token_ids), self.markov_head.markov_w2.weight)

    def confidence(self, normed: Tensor, before: Tensor) -> Tensor:
        """Logits of acceptance (..) of the drafts of these states (.., H) behind the tokens `before` (..)."""
        assert self.confidence_head is not None
        states = normed
        if self.markov_head is not None:
            embeddings = self.markov_states(before)
            states = torch.cat((normed.expand(*embeddings.shape[:-1], -1), embeddings), dim=-1)
        return self.confidence_head.proj(states)[..., 0]
