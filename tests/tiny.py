"""The table of tiny targets: real transformers architectures with random weights, and heads for them.

A new architecture is a new row here; every equivalence test runs over the table. Weights are drawn wider than models
are initialised, so that greedy outputs vary instead of repeating one token.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.drafters.eagle3.config import derive
from fledge.drafters.eagle3.model import DraftModel
from fledge.target import native
from fledge.target.model import Target
from fledge.target.products import KERNELS, ProductChoice

VOCAB = 128
WINDOW = 7  # smaller than every test sequence, so that a forgotten sliding mask shows
EOS = 3

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
}  # fmt: skip
SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2

# name -> (transformers config class, what differs from COMMON)
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 8, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "layer_types": SLIDING_AND_FULL}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
        "layer_types": SLIDING_AND_FULL, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4,
        "num_experts_per_tok": 2, "layer_types": SLIDING_AND_FULL, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 64, "truncate": False}}),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW, "logit_scale": 0.25, "tie_word_embeddings": True,
        "layer_types": SLIDING_AND_FULL}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.2}),
    "deepseek_v3": ("DeepseekV3Config", {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "phi3": ("Phi3Config", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "glm4": ("Glm4Config", {"head_dim": 16, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}  # fmt: skip
NAMES = tuple(TARGETS)

MAMBA = {"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Layers with a running state: chains only.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {"head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}),
    "lfm2": ("Lfm2Config", {"block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2}),
    "falcon_h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "bamba": ("BambaConfig", {**MAMBA, "mamba_n_heads": 8, "attn_layer_indices": [1, 3]}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**MAMBA, "mamba_n_heads": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2}),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A fresh random model of the table's row."""
    import transformers

    config_class, differs = {**TARGETS, **HYBRIDS}[name]
    config = getattr(transformers, config_class)(**{**COMMON, **differs, **overrides})
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 and "bias" in key:  # zero at initialisation: would hide a dropped bias
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def tiny_target(name: str) -> Target:
    """The target of the table's row, made once."""
    model = tiny_model(name)
    taps = None if model.config.num_hidden_layers >= 7 else (1, 2, 3)
    return Target(model, tap_layers=taps, name=f"tiny-{name}")


def tiny_draft(
    target: Target,
    kind: Literal["random", "zero", "adversarial"] = "random",
    *,
    draft_vocab_size: int | None = 48,
    eagle31: bool = False,
    seed: int = 1,
    **config: Any,
) -> DraftModel:
    """An untrained head. `zero` ties all its scores; `adversarial` is sure of the tokens it should like least."""
    torch.manual_seed(seed)
    derived = replace(tiny_config(target, draft_vocab_size, eagle31), **config)
    draft = DraftModel(derived, target.embedding_weight)
    if not draft.config.full_vocab:
        draft.set_vocab(*tiny_vocab(target.vocab_size, draft.config.draft_vocab_size, seed))
    with torch.no_grad():
        if kind == "zero":
            for parameter in draft.parameters():
                parameter.zero_()
        if kind == "adversarial":
            draft.warm_start_head(target.head_weight)
            draft.lm_head.weight.mul_(-1e4)
    return draft.eval().requires_grad_(False)


def tiny_config(target: Target, draft_vocab_size: int | None = 48, eagle31: bool = False) -> Any:
    """The derived draft config of a tiny target."""
    return derive(
        target.text_config, vocab_size=target.vocab_size, tap_layers=target.tap_layers,
        draft_vocab_size=draft_vocab_size, eagle31=eagle31,
    )  # fmt: skip


def tiny_vocab(vocab_size: int, draft_vocab_size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """d2t and t2d of a random draft vocabulary that holds EOS."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat((torch.tensor([EOS]), order[order != EOS]))[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    return chosen - torch.arange(draft_vocab_size), t2d


@functools.cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype for this processor: of bf16 it has none without AVX-512."""
    try:
        KERNELS["onednn"].pack(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:
        return False
    return True


def always_packed(kernel: str) -> Callable[..., ProductChoice]:
    """In place of `products.choice_for`: this kernel where it takes the layers, else oneDNN's with rows filled up."""

    def choice(_shape: str, groups: Sequence[Sequence[torch.nn.Linear]]) -> ProductChoice:
        outputs, weight = sum(layer.out_features for layer in groups[0]), groups[0][0].weight
        if kernel == "loop" and native.can_multiply(outputs, weight.shape[1], weight.dtype):
            return ProductChoice("loop", (), True)
        return ProductChoice("onednn" if onednn_packs(weight.dtype) else None, (2, 4, 4), True)

    return choice


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()


class ScriptedDraft(DraftModel):
    """A head of the right shape that knows the answers: it proposes the script's token j (certain) as token j, others
    after it. Every `wrong`-th token it proposes is another one.

    `scripts` are the prompts with their answers. A sequence is recognised by its root, so it may lie in any slot. The
    states carry nothing but the row's position and the script's number; the real layer runs all the same, so the cache
    sees traffic.
    """

    def __init__(self, target: Target, *scripts: list[int], wrong: int = 0) -> None:
        super().__init__(tiny_config(target, None), target.embedding_weight)
        longest = max(map(len, scripts))
        self.right = torch.tensor([[*script, *[0] * (longest - len(script))] for script in scripts])
        off = (torch.arange(longest) % wrong == 0) if wrong else torch.zeros(longest, dtype=torch.bool)
        self.script = (self.right + off) % VOCAB

    def step(self, token_ids, hidden, position_ids, cache, mask=None, *, rope=None, output_row=None):  # noqa: D102
        output = super().step(token_ids, hidden, position_ids, cache, mask, rope=rope, output_row=output_row)
        if output_row is None:
            place = torch.stack((hidden[..., 0] + 1, hidden[..., 1]), dim=-1)
        else:
            position, root = cache.rows.gather(1, output_row[:, None]), token_ids.gather(1, output_row[:, None])
            same = self.right[:, (position + 1).clamp(max=self.right.shape[1] - 1)[:, 0]].T == root  # (B, scripts)
            place = torch.stack((position, same.int().argmax(1, keepdim=True)), dim=-1)
        return torch.cat((place.to(output.dtype), torch.zeros_like(output[..., 2:])), dim=-1)

    def logits_and_feedback(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.logits(hidden), hidden

    def logits(self, hidden: Tensor) -> Tensor:  # noqa: D102
        position = (hidden[..., 0].long() + 2).clamp(max=self.script.shape[1] - 1)
        next_token = self.script[hidden[..., 1].long(), position]
        ranking = -0.1 * torch.arange(self.config.draft_vocab_size).expand(*next_token.shape, -1)
        return ranking.scatter(-1, next_token[..., None], 10.0)
