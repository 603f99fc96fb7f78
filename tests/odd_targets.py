"""More tiny targets than `tiny.py` has, and what decoding can do with each: the specification of the self-test.

These run through one short test each, and through the sweep (`sweep.py`).
"""

import functools
from typing import Any

import torch
from tiny import COMMON, SLIDING_AND_FULL, TARGETS, VOCAB, WINDOW

from fledge.decoding.probe import Ability, probe
from fledge.errors import UserError
from fledge.target.model import Target

ROPE_LIMIT = 32
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0 + n for n in range(8)],
    "original_max_position_embeddings": ROPE_LIMIT,
}  # fmt: skip
SPARSE = {**TARGETS["deepseek_v3"][1], "index_topk": 16, "index_head_dim": 16, "index_n_heads": 16}
MOE = {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}
PER_LAYER = {**SLIDING, "head_dim": 16, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 4,
         "layer_types": ["linear_attention", "full_attention"] * 2}  # fmt: skip

# name -> (transformers config class, what differs from COMMON, what decoding can do with it)
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi3_longrope": ("Phi3Config", {
        "rope_parameters": LONGROPE, "original_max_position_embeddings": ROPE_LIMIT}, "trees"),
    "phimoe_longrope": ("PhimoeConfig", {"num_local_experts": 4, "original_max_position_embeddings": ROPE_LIMIT,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.2}}, "trees"),
    "ministral3": ("Ministral3Config", {"head_dim": 16, "sliding_window": None, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": ROPE_LIMIT,
        "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "max_position_embeddings": 256}}, "trees"),
    "llama4": ("Llama4TextConfig", {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
        "attention_chunk_size": WINDOW}, "trees"),
    "gemma3n": ("Gemma3nTextConfig", {**PER_LAYER, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4}, "trees"),
    "gemma4": ("Gemma4TextConfig", {**PER_LAYER, "global_head_dim": 32, "num_kv_shared_layers": 2}, "trees"),
    "moshi": ("MoshiConfig", {"sliding_window": 64, "audio_vocab_size": 32, "num_codebooks": 2}, "trees"),
    "gpt2": ("GPT2Config", {"n_positions": 256, "initializer_range": 0.4}, "trees"),
    "glm4_moe": ("Glm4MoeConfig", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}, "trees"),
    "minimax_m2": ("MiniMaxM2Config", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "trees"),
    "exaone4": ("Exaone4Config", SLIDING, "trees"),
    "olmo3": ("Olmo3Config", SLIDING, "trees"),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}, "trees"),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}, "trees"),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "expansion_ratio": 2},
        "chains"),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 4}, "chains"),
    "falcon": ("FalconConfig", {}, "chains"),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "initializer_range": 0.5}, "chains"),
    "deepseek_v32": ("DeepseekV32Config", SPARSE, "chains"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", SPARSE, "chains"),
    "nemotron_h": ("NemotronHConfig", {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "head_dim": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}, "chains"),
    "zamba2": ("Zamba2Config", {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4,
        "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8,
        "num_mem_blocks": 1, "use_mem_rope": True}, "chains"),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "chains"),
    "olmo_hybrid": ("OlmoHybridConfig", {**DELTA, "linear_num_key_heads": 4}, "chains"),
    "qwen3_5": ("Qwen3_5TextConfig", {**DELTA, "head_dim": 16, "linear_num_key_heads": 2}, "chains"),
    "jamba": ("JambaConfig", {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False}, "plain"),
    "doge": ("DogeConfig", {"keep_window_size": 8}, "plain"),
    "minimax": ("MiniMaxConfig", {"num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2}, "refused"),
}  # fmt: skip


@functools.cache
def odd_target(name: str) -> Target:
    """The target of the row, made once."""
    return target_of_row(name, *ODD[name][:2])


def target_of_row(name: str, config_class: str, differs: dict[str, Any]) -> Target:
    """A fresh target."""
    import transformers

    config = getattr(transformers, config_class)(**{**COMMON, **differs})
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("bias" in key or key.endswith(".A")):  # zero at initialisation
            torch.nn.init.normal_(parameter, std=0.3)
    return Target(model, tap_layers=(1, 2, 3), name=f"tiny-{name}")


def librarys_answer(target: Target, ids: list[int], new: int) -> list[int]:
    """What `generate` of transformers answers."""
    asked = torch.tensor([ids])
    theirs = target.model.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return theirs[0, len(ids) :].tolist()


@functools.cache
def found(target: Target) -> tuple[str, str]:
    """What the self-test says: the most that can be drafted, and why it is not more."""
    try:
        ability: Ability = probe(target)
    except UserError as error:
        return "refused", str(error).split("because ")[1].split(". Serve")[0]
    if ability.rope_limit:
        return ability.most, "read again where its longrope changes, as `generate` does"
    return ability.most, ability.reason
