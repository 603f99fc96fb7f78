"""Block drafts for tests, and their forward written out anchor by anchor: what drafting and training must equal.

Nothing here uses the package's attention, caches or losses: plain matrices, one block at a time.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from tiny import tiny_vocab
from torch import Tensor

from fledge.drafters.dspark.config import BlockConfig, DraftType, derive_block
from fledge.drafters.dspark.model import BlockDraft
from fledge.target.model import Target

Kind = Literal["random", "adversarial"]


def tiny_block(
    target: Target, draft_type: DraftType, kind: Kind = "random", *, draft_vocab_size: int | None = 48, **overrides: Any
) -> BlockDraft:
    """An untrained block draft. `adversarial` is sure of the tokens it should like least."""
    torch.manual_seed(1)
    config = derive_block(
        target.text_config, draft_type, vocab_size=target.vocab_size, tap_layers=target.tap_layers, mask_token_id=5,
        draft_vocab_size=draft_vocab_size, overrides={"num_layers": 2, "block_size": 6, **overrides},
    )  # fmt: skip
    return lively(BlockDraft(config, target.embedding_weight, target.head_weight), kind).requires_grad_(False)


def lively(draft: BlockDraft, kind: Kind = "random") -> BlockDraft:
    """A draft whose norms, Markov and confidence heads all matter."""
    if not draft.config.full_vocab:
        draft.set_vocab(*tiny_vocab(draft.config.vocab_size, draft.config.draft_vocab_size))
    draft.warm_start_head()
    for module in draft.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    if draft.markov_head is not None:
        torch.nn.init.normal_(draft.markov_head.markov_w1.weight)
    if kind == "adversarial":
        draft.norm.weight.data.mul_(-1e4)
    return draft.eval()


def norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """states (rows, heads, d) by angles (rows, R): the first half of R with the second."""
    cos, sin = (part[:, None] for part in rope)
    size = cos.shape[-1]
    low, high = states[..., : size // 2], states[..., size // 2 : size]
    return torch.cat((states[..., :size] * cos + torch.cat((-high, low), -1) * sin, states[..., size:]), dim=-1)


def block_states(draft: BlockDraft, input_ids: Tensor, taps: Tensor, positions: Tensor, anchor: int) -> Tensor:
    """Final normed states (B, H) of the block at row `anchor` of one document (T,), taps (T, A, H)."""
    config, eps = draft.config, draft.config.rms_norm_eps
    weights = dict(draft.named_parameters())
    start = 0 if config.sliding_window is None else max(0, anchor - config.sliding_window)
    context = norm(taps[start:anchor].flatten(1) @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    inputs = torch.tensor([int(input_ids[anchor]), *[config.mask_token_id] * (config.block_size - 1)])
    hidden = draft.embedding[inputs]
    where = torch.cat((positions[..., start:anchor], positions[..., anchor, None] + torch.arange(len(inputs))), dim=-1)
    rope = draft.rope(where)
    own = tuple(part[len(context) :] for part in rope)
    for layer in range(config.num_layers):
        at = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
        normed = norm(hidden, at["input_layernorm.weight"], eps)
        both = torch.cat((context, normed))
        q = (normed @ at["self_attn.q_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
        k = (both @ at["self_attn.k_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
        v = (both @ at["self_attn.v_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
        q = turned(norm(q, at["self_attn.q_norm.weight"], eps), own)
        k = turned(norm(k, at["self_attn.k_norm.weight"], eps), rope)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("shd,khd->hsk", q, k) / config.head_dim**0.5
        if config.causal:
            slots = torch.arange(len(inputs))
            later = torch.zeros(len(inputs), len(both), dtype=torch.bool)
            later[:, len(context) :] = slots > slots[:, None]
            scores = scores.masked_fill(later, float("-inf"))
        attended = torch.einsum("hsk,khd->shd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + attended @ at["self_attn.o_proj.weight"].T
        normed = norm(hidden, at["post_attention_layernorm.weight"], eps)
        gate, up = (normed @ at[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (F.silu(gate) * up) @ at["mlp.down_proj.weight"].T
    return norm(hidden, weights["norm.weight"], eps)


def draft_logits(draft: BlockDraft, states: Tensor, number: int, before: int | Tensor) -> Tensor:
    """Logits (D,) of the `number`-th draft of a block whose states (B, H) are given, behind the token `before`."""
    config: BlockConfig = draft.config
    logits = states[number + config.first_slot] @ draft.head_weight.T
    if draft.markov_head is not None:
        logits = logits + draft.markov_head.markov_w2.weight @ draft.markov_head.markov_w1.weight[before]
    return logits
