"""A draft step as two compiled calls around its attention, while a CPU drafts.

A step of a head multiplies ten megabytes and has sixty small operations around that, which took half of its time. The
parts are those of the target's layers (`fledge.target.fused`): the input is token and feature side by side, so what
comes before the attention is twice as wide as what comes behind it. `DraftModel.step` is the slow twin in the tests.
"""

import torch
from torch import Tensor

from fledge.drafters.eagle3.model import DraftModel, KeyValueCache, rows_at
from fledge.drafters.layers import RMSNorm
from fledge.target import native
from fledge.target.attention import grouped_sdpa
from fledge.target.products import Product, loop_of

# B sequences, S rows, R = B S, H hidden size, h query heads, d head_dim


class FusedStep:
    """`DraftModel.step` of a head with full rotary embeddings whose products are those of `multiply.c`."""

    def __init__(self, draft: DraftModel, products: dict[str, Product]) -> None:
        self.draft, self.products = draft, products
        self.refresh()

    def refresh(self) -> None:
        """Look at the weights again; they may have been trained since."""
        layer, config = self.draft.midlayer, self.draft.config
        facts = {"eps": config.rms_norm_eps, "residual": 1.0, "heads": config.num_attention_heads}
        facts |= {"groups": config.num_key_value_heads, "size": config.head_dim}
        self.before = native.Layer(hidden=2 * config.hidden_size, **facts)
        self.behind = native.Layer(hidden=config.hidden_size, inner=config.intermediate_size, **facts)
        for name, product in self.products.items():
            weight, bias = product.parts()
            assert bias is None, "a head's layers have none"
            setattr(self.before if name == "qkv" else self.behind, name, weight.data_ptr())
        attention = layer.self_attn
        if attention.q_norm is not None and attention.k_norm is not None:
            self.before.query_norm, self.before.key_norm = (
                norm.weight.data_ptr() for norm in (attention.q_norm, attention.k_norm)
            )
        self.behind.mlp_norm = layer.post_attention_layernorm.weight.data_ptr()

    def __call__(
        self, token_ids: Tensor, hidden: Tensor, position_ids: None, cache: KeyValueCache, mask: Tensor, *,
        rope: tuple[Tensor, Tensor], output_row: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `DraftModel.step`."""
        layer, config, (batch, rows) = self.draft.midlayer, self.draft.config, token_ids.shape
        normed = layer.hidden_norm(hidden)
        inputs = torch.cat((layer.input_layernorm(self.draft.embed(token_ids)), normed), dim=-1)
        kinds = {inputs.dtype, hidden.dtype, rope[0].dtype, mask.dtype, layer.self_attn.o_proj.weight.dtype}
        if len(kinds) > 1 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.draft.step(token_ids, hidden, None, cache, mask, rope=rope, output_row=output_row)
        cos, sin = (one.contiguous() for one in rope)
        query, keys, values = native.before_attention(self.before, inputs.flatten(0, 1), cos, sin, batch, rows)
        residual = normed if config.norm_before_residual else hidden
        if output_row is not None:
            query = rows_at(query.transpose(1, 2), output_row).transpose(1, 2)
            residual = rows_at(residual, output_row)
        keys, values = cache.update(keys, values)
        mixed = native.attend(query, keys, values, mask, config.head_dim**-0.5)
        if mixed is None:
            mixed = grouped_sdpa(query, keys, values, mask).transpose(1, 2)
        states = residual.reshape(-1, config.hidden_size).contiguous()
        out, _ = native.behind_attention(self.behind, states, mixed.reshape(len(states), -1).contiguous())
        return out.view(residual.shape)


def fused_step(draft: DraftModel) -> FusedStep | None:
    """None for a head that takes `DraftModel.step`."""
    attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
    products = {
        "qkv": loop_of(attention.q_proj, attention.k_proj, attention.v_proj), "mix": loop_of(attention.o_proj),
        "gate_up": loop_of(mlp.gate_proj, mlp.up_proj), "down": loop_of(mlp.down_proj),
    }  # fmt: skip
    found = {name: product for name, product in products.items() if product is not None}
    config, kind = draft.config, attention.q_proj.weight.dtype
    whole = 2 * draft.rotary.inv_freq.numel() == config.head_dim <= native.MOST_SIZE
    norms = [one for one in draft.midlayer.modules() if isinstance(one, RMSNorm)]
    fits = config.intermediate_size % native.LANES == 0 and all(norm.weight.dtype is kind for norm in norms)
    return FusedStep(draft, found) if len(found) == len(products) and whole and fits else None
