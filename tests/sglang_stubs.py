"""SGLang's llama_eagle3.py, run from its source on a CPU: its own model and loader over small real building blocks.

The file imports SGLang's layers, which need CUDA. Here each stands in as the plain torch it computes (RMSNorm with a
residual, merged projections with a loader per shard, dense causal attention); names, order, residuals, norms and the
loading of weights are the engine's own code.
"""

import contextlib
import sys
import types
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fledge.drafters.layers import rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((size,), torch.nan)), eps

    def forward(self, hidden: Tensor, residual: Tensor | None = None):
        summed = hidden if residual is None else hidden + residual
        normed = F.rms_norm(summed, self.weight.shape, self.weight, self.eps)
        return normed if residual is None else (normed, summed)


class Merged(nn.Module):
    """Several projections in one weight; `weight_loader` fills the rows of one shard, as SGLang's do."""

    def __init__(self, inputs: int, rows: dict[Any, int]) -> None:
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.full((sum(rows.values()), inputs), torch.nan)), rows
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor, shard: Any) -> None:
        keys = list(self.rows)
        start = sum(self.rows[key] for key in keys[: keys.index(shard)])
        assert loaded.shape == (self.rows[shard], parameter.shape[1])
        parameter.data[start : start + self.rows[shard]] = loaded

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return list((hidden @ self.weight.T).split(list(self.rows.values()), dim=-1))


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim, self.total_num_heads = config.head_dim, config.num_attention_heads
        self.total_num_kv_heads = config.num_key_value_heads
        self.o_proj = nn.Linear(self.total_num_heads * self.head_dim, config.hidden_size, bias=False)
        nn.init.constant_(self.o_proj.weight, torch.nan)
        self.rotary = LlamaRotaryEmbedding(config)
        self.attn = SimpleNamespace(sliding_window_size=None)
        self.qkv_proj: Any = None

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        cos, sin = self.rotary(hidden_states, positions[None])
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(hidden_states))
        q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0])
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(attended.transpose(0, 1).flatten(-2))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, inner: int, act: str, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        assert act == "silu"
        self.gate_up_proj = Merged(hidden_size, {0: inner, 1: inner})
        self.down_proj = nn.Linear(inner, hidden_size, bias=False)
        nn.init.constant_(self.down_proj.weight, torch.nan)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_id: int = 0, quant_config: Any = None, prefix: str = "",
                 stage_boundaries: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = Attention(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def qkv(inputs: int, head_dim: int, heads: int, kv_heads: int, **_: Any) -> Merged:
    return Merged(inputs, {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim})


class Rows(nn.Module):
    """An embedding or a head."""

    def __init__(self, rows: int, size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, size), torch.nan))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def default_weight_loader(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


MODULES: dict[str, dict[str, Any]] = {
    "configs.draft_parallel": {"DraftParallelSpec": lambda **_: None,
                               "DraftTPExecution": SimpleNamespace(SINGLE_GROUP=None)},
    "runtime_context": {"get_spec": lambda: SimpleNamespace(speculative_draft_window_size=None),
                        "get_parallel": lambda: SimpleNamespace(pp_group=None)},
    "utils": {"add_prefix": lambda name, prefix: f"{prefix}.{name}" if prefix else name},
    "layers.layer_boundary": {"layer_stack": contextlib.nullcontext},
    "layers.layernorm": {"RMSNorm": RMSNorm},
    "layers.linear": {"QKVParallelLinear": qkv},
    "layers.logits_processor": {"LogitsProcessor": lambda config: None},
    "layers.quantization.base_config": {"QuantizationConfig": object},
    "layers.vocab_parallel_embedding": {"ParallelLMHead": Rows, "VocabParallelEmbedding": Rows},
    "model_executor.forward_batch_info": {"ForwardBatch": object, "PPProxyTensors": object},
    "model_loader.weight_utils": {"default_weight_loader": default_weight_loader},
    "models.llama": {"LlamaDecoderLayer": DecoderLayer, "LlamaForCausalLM": nn.Module, "LlamaMLP": MLP},
}  # fmt: skip


def load_module(source: str) -> types.ModuleType:
    """The engine's module, executed with the stand-ins in place of its imports."""
    stubs = {}
    for name, contents in MODULES.items():
        parts = f"sglang.srt.{name}".split(".")
        for end in range(1, len(parts) + 1):
            stubs.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        stubs[".".join(parts)].__dict__.update(contents)
    module = types.ModuleType("llama_eagle3_of_sglang")
    with mock.patch.dict(sys.modules, stubs):
        exec(compile(source, "llama_eagle3.py", "exec"), vars(module))
    return module
