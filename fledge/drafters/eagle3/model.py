"""The EAGLE-3 draft head: a decoder layer over the target's tapped states (EAGLE-3 paper, section 3).

    g      = [tap_low | tap_mid | tap_high]                       (.., A * H)
    f      = fc(g)                                                (.., H)      `fuse`: on target features only
    x      = [RMSNorm_input(e) | RMSNorm_hidden(f)]               (.., 2H)     embedding first, hidden second
    f'     = f + Attention(x)                                     residual is the un-normed f
    f''    = f' + SwiGLU(RMSNorm_post(f'))                        `finish`
    logits = lm_head(RMSNorm_norm(f''))                           `logits`
    next f = f''            EAGLE-3.1: RMSNorm_norm(f'')          `feedback`

Where a head has further layers, they are plain ones between f'' and the logits, and f'' is what the last one gives.

Module names are the checkpoint's names, so the state dict *is* the EAGLE layout. The same module trains
(`fledge.train`), exports and decodes; it knows nothing of trees, losses or files.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fledge.drafters.bound_head import BoundHead
from fledge.drafters.cpu_kernels import linear, through
from fledge.drafters.eagle3.config import DraftConfig, to_json
from fledge.drafters.eagle3.ttt_attention import ttt_attention
from fledge.drafters.layer_cache import KeysValues
from fledge.drafters.layers import RMSNorm, SwiGLU, rotate
from fledge.drafters.runs import Run
from fledge.target.attention import grouped_sdpa
from fledge.target.linear import head_logits
from fledge.target.model import Target

# leading dims "..": any batch shape; H hidden, A taps, D draft vocab, V target vocab, h heads, g kv heads, d head_dim


class KeyValueCache(Protocol):
    """What `DraftModel.step` needs of a cache: store new keys and values of a layer, return all of them."""

    def update(self, keys: Tensor, values: Tensor, layer: int = 0) -> KeysValues: ...


class Attention(nn.Module):
    """Projections of the draft's attention; the attention itself differs between training and decoding."""

    def __init__(self, config: DraftConfig, inputs: int) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(inputs, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def project(
        self, inputs: Tensor, rope: tuple[Tensor, Tensor], queries: slice | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (.., h, d), k and v (.., g, d) from normed inputs (.., X). See `DraftModel.project`."""
        cos, sin = rope
        query_inputs = inputs if queries is None else inputs[..., queries, :]
        query_rope = (cos, sin) if queries is None else (cos[..., queries, :], sin[..., queries, :])
        q = self.q_proj(query_inputs).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(inputs).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(inputs).unflatten(-1, (-1, self.head_dim))
        return *self.turned(q, k, query_rope, rope), v

    def turned(
        self, q: Tensor, k: Tensor, query_rope: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries (.., h, d) and keys (.., g, d), normed where the head does so, at their positions."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *query_rope), rotate(k, *rope)


class DraftLayer(nn.Module):
    """The first decoder layer, over embeddings and states, or one behind it, over the states of the layer before."""

    hidden_norm: RMSNorm  # of the first layer alone

    def __init__(self, config: DraftConfig, *, first: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if first:
            self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, (2 if first else 1) * config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def pass_on(self) -> None:
        """Give the states on as they are, until training has found something to add."""
        nn.init.zeros_(self.self_attn.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)


class DraftModel(BoundHead):
    """An EAGLE-3 (or 3.1) head bound to the target's embedding."""

    config: DraftConfig

    def __init__(self, config: DraftConfig, embedding: Tensor) -> None:
        """`embedding` (V, H) is the target's, shared, frozen and never saved, unless `own_embedding` is bound."""
        super().__init__(config, embedding)
        size, num_taps = config.hidden_size, len(config.tap_layers)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(size, eps=config.rms_norm_eps) for _ in range(num_taps))
        self.fc = nn.Linear(num_taps * size, size, bias=False)
        self.midlayer = DraftLayer(config, first=True)
        further = range(1, config.num_layers)
        self.layers = nn.ModuleDict({str(number): DraftLayer(config, first=False) for number in further})
        self.norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    def document(self, dtype: str) -> dict[str, Any]:
        return to_json(self.config, dtype=dtype)

    def fresh(self, target: Target) -> "DraftModel":
        made = DraftModel(self.config, target.embedding_weight)
        if self.owns_embedding:
            made.own_embedding(self.embedding)
        return made

    @torch.no_grad()
    def warm_start_head(self, target_head: Tensor) -> None:
        """Start lm_head from the target's rows (V, H) of the draft vocabulary."""
        draft_ids = torch.arange(self.config.draft_vocab_size, device=self.d2t.device)
        self.lm_head.weight.copy_(target_head[self.target_ids(draft_ids).to(target_head.device)])

    @torch.no_grad()
    def warm_start(self, target_head: Tensor, tap_hidden: Tensor) -> None:
        """Start where the target's states are: head rows (V, H), and a few hundred rows of taps (N, A, H).

        - lm_head takes the target's rows;
        - fc passes the highest tap on, with the others mixed in weakly, scaled so that f has RMS 1: raw states have RMS
          8 in SmolLM2, and next to them what attention and MLP add at first is lost;
        - the final norm starts low, so that the first logits are unsure (standard deviation 1.25): through the target's
          rows an untrained state is confident and wrong;
        - further layers pass on what they get.
        Measured together: +5 points of top-1 after 60 steps on SmolLM2 (dev/log, "How a head starts").
        """
        self.warm_start_head(target_head)
        for number in range(1, self.config.num_layers):
            self.layer(number).pass_on()
        size = self.config.hidden_size
        self.fc.weight.mul_(0.1)
        self.fc.weight[:, -size:] += torch.eye(size, device=self.fc.weight.device)
        self.fc.weight.div_(self.fuse(tap_hidden).float().pow(2).mean(-1).sqrt().median().clamp_min(1e-6))
        row_norm = self.lm_head.weight.float().norm(dim=-1).median()
        self.norm.weight.fill_(min(1.0, 1.25 / max(float(row_norm), 1e-6)))

    # -- the layers, in the parts that training and decoding share -----------------------------------------------------

    def layer(self, number: int) -> DraftLayer:
        """The first is number 0."""
        return self.layers[str(number)] if number else self.midlayer  # type: ignore[return-value]

    def fuse(self, tap_hidden: Tensor) -> Tensor:
        """Target states (.., A, H) to the step-0 feature f (.., H)."""
        taps = tap_hidden.to(self.fc.weight.device, self.fc.weight.dtype)
        if self.config.fc_norm:
            taps = torch.stack([norm(tap) for norm, tap in zip(self.fc_norm, taps.unbind(-2), strict=True)], dim=-2)
        return through(self.fc, taps.flatten(-2))

    def project(
        self, embeds: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor], *, queries: slice | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (.., h, d), k and v (.., g, d) from token embeddings and hidden states (.., H).

        `queries` picks the rows (dimension -2) whose queries are needed; keys are made for all rows.
        """
        layer = self.midlayer
        inputs = torch.cat((layer.input_layernorm(embeds), layer.hidden_norm(hidden)), dim=-1)
        return layer.self_attn.project(inputs, rope, queries)

    def project_further(
        self, number: int, hidden: Tensor, rope: tuple[Tensor, Tensor], *, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` returns, of a layer behind the first: from states of the layer before (.., H)."""
        layer = self.layer(number)
        return layer.self_attn.project(layer.input_layernorm(hidden), rope, queries)

    def split_projection(self) -> tuple[Tensor, Tensor]:
        """q, k and v as one projection of token embeddings and one of states: twice ((h + 2g) * d, H).

        A linear layer over [e | f] is one over e plus one over f, and the first depends on the token alone: the steps
        of training-time test share it (`fledge.drafters.eagle3.ttt`), which spares them half of these products.
        """
        layer = self.midlayer.self_attn
        whole = torch.cat((layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight))
        return whole[:, : self.config.hidden_size], whole[:, self.config.hidden_size :]

    def project_sum(
        self, tokens: Tensor, hidden: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor], *,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """What `project` returns, from the tokens' half of the projection (N, (h + 2g) * d) and states (N, H).

        `weight` is the states' half; `queries` picks the rows whose queries are needed.
        """
        head_dim, width = self.config.head_dim, self.config.num_attention_heads * self.config.head_dim
        normed, (cos, sin) = self.midlayer.hidden_norm(hidden), rope
        if queries is None:
            q, kv = (tokens + linear(normed, weight)).split((width, weight.shape[0] - width), -1)
            query_rope = rope
        else:
            q = tokens[queries, :width] + linear(normed[queries], weight[:width])
            kv = tokens[:, width:] + linear(normed, weight[width:])
            query_rope = (cos[queries], sin[queries])
        k, v = kv.unflatten(-1, (-1, head_dim)).chunk(2, dim=-2)
        # v as a copy: a view would keep the whole projection alive until the backward
        q = q.unflatten(-1, (-1, head_dim))
        return *self.midlayer.self_attn.turned(q, k, query_rope, rope), v.contiguous()

    def finish(self, hidden: Tensor, attended: Tensor, number: int = 0) -> Tensor:
        """Residual, output projection and MLP of a layer: f (.., H) and attention output (.., h, d) -> f'' (.., H)."""
        layer = self.layer(number)
        residual = layer.hidden_norm(hidden) if self.config.norm_before_residual and not number else hidden
        hidden = residual + through(layer.self_attn.o_proj, attended.flatten(-2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def text_keys(self, token_ids: Tensor, features: Tensor, rope: tuple[Tensor, Tensor]) -> list[KeysValues]:
        """Keys and values (S, g, d) of every layer over a text: the tokens (S,) behind the features (S, H).

        Those of the first layer need no attention, so for a head of one layer nothing is computed that nobody reads.
        """
        q, k, v = self.project(self.embed(token_ids), features, rope)
        found, hidden = [(k, v)], features
        for number in range(1, self.config.num_layers):
            attended = ttt_attention(q, k, v, (), (), (Run(0, 0, len(q)),), self.config.sliding_window)
            hidden = self.finish(hidden, attended, number - 1)
            q, k, v = self.project_further(number, hidden, rope)
            found.append((k, v))
        return found

    def feedback(self, hidden: Tensor) -> Tensor:
        """f'' to the f of the next draft step."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """f'' (.., H) -> (.., D)."""
        return self.logits_and_feedback(hidden)[0]

    def logits_and_feedback(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Both of f'', with one norm."""
        normed = self.norm(hidden)
        return head_logits(self.lm_head, normed), normed if self.config.norm_output else hidden

    # -- decoding ------------------------------------------------------------------------------------------------------

    def step(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        position_ids: Tensor | None,
        cache: KeyValueCache,
        mask: Tensor | None = None,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        output_row: Tensor | None = None,
    ) -> Tensor:
        """One forward with a cache: tokens (B, S), features f (B, S, H) -> f'' (B, S, H), or (B, 1, H) of the row
        `output_row` (B,) of each sequence.

        Row s pairs the feature of position p with the *next* token; position_ids (B, S) hold p, the feature's
        position (`rope`, cos and sin of those positions, stands in for them). `mask` (B, 1, S, K) is boolean (True: may
        see) or additive over cached + new keys; None means one row that sees everything, or a causal block on an empty
        cache. A head of one layer computes the output row alone, and its mask may be that row's: (B, 1, 1, K).
        """
        if rope is None:
            assert position_ids is not None
            rope = self.rope(position_ids)
        q, k, v = self.project(self.embed(token_ids), hidden, rope)
        for number in range(self.config.num_layers):
            if number:
                q, k, v = self.project_further(number, hidden, rope)
            if output_row is not None and number == self.config.num_layers - 1:
                q, hidden = rows_at(q, output_row), rows_at(hidden, output_row)
                mask = row_of_mask(mask, output_row)
            keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), number)
            causal = mask is None and q.shape[1] > 1
            assert not causal or keys.shape[2] == q.shape[1], "a block of rows on a filled cache needs a mask"
            attended = grouped_sdpa(q.transpose(1, 2), keys, values, mask, causal=causal)
            hidden = self.finish(hidden, attended.transpose(1, 2), number)
        return hidden


def rows_at(states: Tensor, index: Tensor) -> Tensor:
    """states (B, S, ..), index (B,) -> (B, 1, ..)."""
    return states.gather(1, index.view(-1, *[1] * (states.dim() - 1)).expand(-1, 1, *states.shape[2:]))


def row_of_mask(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """mask (B, 1, S, K), index (B,) -> (B, 1, 1, K); one that has a single row is that row's."""
    return mask if mask is None or mask.shape[2] == 1 else rows_at(mask[:, 0], index)[:, None]
