"""A draft step as two compiled calls around the attention of each layer, or as few kernels on a GPU.

A step of a head multiplies ten megabytes and has sixty small operations around that, which took half of its time. The
parts are those of the target's layers (`fledge.target.fused`): the input is token and feature side by side, so what
comes before the attention is twice as wide as what comes behind it. `DraftModel.step` is the slow twin in the tests.
"""

from typing import Any

import torch
from torch import Tensor

from fledge.drafters.eagle3.model import DraftLayer, DraftModel, KeyValueCache, row_of_mask, rows_at
from fledge.drafters.layers import RMSNorm
from fledge.target import card, gpu, gpu_products, native
from fledge.target.attention import grouped_sdpa
from fledge.target.fused import HasGoals, together
from fledge.target.products import Product

Joint = Product | gpu_products.Joined

# B sequences, S rows, R = B S, H hidden size, h query heads, d head_dim


class FusedStep:
    """`DraftModel.step` of a head with full rotary embeddings whose products are those of `multiply.c`, or on a GPU."""

    def __init__(self, draft: DraftModel, products: list[dict[str, Joint]]) -> None:
        self.draft, self.products = draft, products  # of every layer
        self.operations: Any = gpu if card.runs_on(draft.fc.weight.device) else native
        self.refresh()

    def refresh(self) -> None:
        """Look at the weights again; they may have been trained since."""
        self.layers = [self._layer(number, products) for number, products in enumerate(self.products)]

    def _layer(self, number: int, products: dict[str, Joint]) -> tuple[Any, Any]:
        """What comes before the attention of a layer, and what behind it."""
        layer, config = self.draft.layer(number), self.draft.config
        facts = {"eps": config.rms_norm_eps, "residual": 1.0, "heads": config.num_attention_heads}
        facts |= {"groups": config.num_key_value_heads, "size": config.head_dim}
        before = self.operations.Layer(hidden=config.hidden_size if number else 2 * config.hidden_size, **facts)
        behind = self.operations.Layer(hidden=config.hidden_size, inner=config.intermediate_size, **facts)
        for name, product in products.items():
            weight, bias = product.parts()
            assert bias is None, "a head's layers have none"
            setattr(before if name == "qkv" else behind, name, self._given(weight))
        if number:
            before.in_norm = self._given(layer.input_layernorm.weight)
        attention = layer.self_attn
        if attention.q_norm is not None and attention.k_norm is not None:
            before.query_norm, before.key_norm = (
                self._given(norm.weight) for norm in (attention.q_norm, attention.k_norm)
            )
        behind.mlp_norm = self._given(layer.post_attention_layernorm.weight)
        return before, behind

    def _given(self, weight: Tensor) -> Any:
        """A weight as the operations take it."""
        return weight.detach() if self.operations is gpu else weight.data_ptr()

    def __call__(
        self, token_ids: Tensor, hidden: Tensor, position_ids: None, cache: KeyValueCache, mask: Tensor | None, *,
        rope: tuple[Tensor, Tensor], output_row: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `DraftModel.step`."""
        layer, config, (batch, rows) = self.draft.midlayer, self.draft.config, token_ids.shape
        norms = layer.input_layernorm.weight, layer.hidden_norm.weight
        kinds = {hidden.dtype, rope[0].dtype, norms[0].dtype, hidden.dtype if mask is None else mask.dtype}
        inputs = None
        if len(kinds) == 1 and not torch.is_autocast_enabled(hidden.device.type) and not torch.is_grad_enabled():
            operands = (token_ids, self.draft.embedding, norms[0], hidden, norms[1])
            inputs = self.operations.beside(*operands, config.rms_norm_eps)
        if inputs is None:
            return self.draft.step(token_ids, hidden, None, cache, mask, rope=rope, output_row=output_row)
        cos, sin = (one.contiguous() for one in rope)
        residual = inputs[..., config.hidden_size :] if config.norm_before_residual else hidden
        seen = mask
        for number, (before, behind) in enumerate(self.layers):
            inputs = (residual if number else inputs).flatten(0, 1).contiguous()
            goal = cache.goal(number) if self.operations is gpu and isinstance(cache, HasGoals) else None
            more = () if goal is None else (goal,)
            query, keys, values = self.operations.before_attention(before, inputs, cos, sin, batch, rows, *more)
            if output_row is not None and number == len(self.layers) - 1:
                query = rows_at(query.transpose(1, 2), output_row).transpose(1, 2)
                residual, seen = rows_at(residual, output_row), row_of_mask(seen, output_row)
            if isinstance(cache, HasGoals) and goal is not None:
                keys, values = cache.rows_read(number)
            else:
                keys, values = cache.update(keys, values, number)
            mixed = None if self.operations is gpu else native.attend(query, keys, values, seen, config.head_dim**-0.5)
            if mixed is None:
                mixed = grouped_sdpa(query, keys, values, seen).transpose(1, 2)
            states = residual.reshape(-1, config.hidden_size).contiguous()
            out, _ = self.operations.behind_attention(behind, states, mixed.reshape(len(states), -1).contiguous())
            residual = out.view(residual.shape)
        return residual


def fused_step(draft: DraftModel) -> FusedStep | None:
    """None for a head that takes `DraftModel.step`."""
    config, layers = draft.config, [draft.layer(number) for number in range(draft.config.num_layers)]
    products = [found for layer in layers if (found := _products(layer)) is not None]
    whole = 2 * draft.rotary.inv_freq.numel() == config.head_dim <= native.MOST_SIZE
    kinds = {one.weight.dtype for layer in layers for one in layer.modules() if isinstance(one, RMSNorm)}
    fits = config.intermediate_size % native.LANES == 0 and kinds == {draft.fc.weight.dtype}
    return FusedStep(draft, products) if len(products) == len(layers) and whole and fits else None


def _products(layer: DraftLayer) -> dict[str, Joint] | None:
    """Those of a layer, where all of them are the loop's, or on a GPU."""
    attention, mlp = layer.self_attn, layer.mlp
    products = {
        "qkv": together(attention.q_proj, attention.k_proj, attention.v_proj), "mix": together(attention.o_proj),
        "gate_up": together(mlp.gate_proj, mlp.up_proj), "down": together(mlp.down_proj),
    }  # fmt: skip
    found = {name: product for name, product in products.items() if product is not None}
    return found if len(found) == len(products) else None
