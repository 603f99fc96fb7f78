"""Architectures that only the sweep looks at: a row is a config class and what differs from `COMMON`."""

from typing import Any

from odd_targets import DELTA, MOE, SLIDING
from tiny import HYBRIDS, WINDOW

ROUTED = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
                          "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
             "mrope_section": [2, 1, 1], "mrope_interleaved": True}}  # fmt: skip
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32}  # fmt: skip

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    # ---- full attention
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "afmoe": ("AfmoeConfig", {**MOE, "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, **SLIDING}),
    "cohere": ("CohereConfig", {}),
    "diffllama": ("DiffLlamaConfig", {}),
    "dots1": ("Dots1Config", {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4,
        "moe_num_shared_experts": 1}),
    "exaone_moe": ("ExaoneMoeConfig", {**MOE, **SLIDING, "num_experts": 4, "num_shared_experts": 1, "n_group": 1,
        "topk_group": 1}),
    "flex_olmo": ("FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**ROUTED, **LATENT, "n_shared_experts": 1, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "hy_v3": ("HYV3Config", {**MOE, "num_experts": 4, "num_shared_experts": 1}),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.5}),
    "granite_swa": ("GraniteSWAConfig", {**SLIDING, "logits_scaling": 3.0}),
    "internlm3": ("InternLM3Config", {"head_dim": 16}),
    "jais2": ("Jais2Config", {"head_dim": 16}),
    "minicpm3": ("MiniCPM3Config", {**LATENT, "dim_model_base": 32}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {**ROUTED, **SLIDING, "head_dim": 24, "v_head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nanochat": ("NanoChatConfig", {}),
    "nemotron": ("NemotronConfig", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "phi": ("PhiConfig", {}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN_EXPERTS}),
    "solar_open": ("SolarOpenConfig", {**ROUTED, "n_shared_experts": 1}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "vaultgemma": ("VaultGemmaConfig", {**SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "youtu": ("YoutuConfig", {**LATENT}),
    # ---- caches and attention of their own
    "deepseek_v2": ("DeepseekV2Config", {**ROUTED, **LATENT, "first_k_dense_replace": 1}),
    "longcat_flash": ("LongcatFlashConfig", {**LATENT, "num_layers": 2, "ffn_hidden_size": 96, "moe_topk": 2,
        "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32, "head_dim": 8}),
    "deepseek_v4": ("DeepseekV4Config", {**MOE, "num_key_value_heads": 1, "q_lora_rank": 24, "n_routed_experts": 4,
        "n_shared_experts": 1, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 16,
        "index_topk": 16, "sliding_window": WINDOW, "hc_mult": 2}),
    "minimax_m3": ("MiniMaxM3VLTextConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 4,
        "dense_intermediate_size": 96, "shared_intermediate_size": 32}),
    # ---- running states
    "bailing_hybrid": ("BailingHybridConfig", {**MOE, **LATENT, "num_local_experts": 4, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "layer_types": DELTA["layer_types"]}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "granitemoehybrid_dense": ("GraniteMoeHybridConfig", {**HYBRIDS["granitemoehybrid"][1], "num_local_experts": 0}),
    "kimi_linear": ("KimiLinearConfig", {**MOE, **LATENT, "num_local_experts": 4, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": DELTA["layer_types"]}),
    "lfm2_moe": ("Lfm2MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2}),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "qwen3_5_mrope": ("Qwen3_5TextConfig", {**DELTA, **QWEN_ROPE, "head_dim": 16, "linear_num_key_heads": 2}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**DELTA, **QWEN_ROPE, **QWEN_EXPERTS, "head_dim": 16,
        "linear_num_key_heads": 2}),
    "qwen4_exp": ("Qwen4ExpTextConfig", {**DELTA, **QWEN_ROPE, **QWEN_EXPERTS, "head_dim": 16,
        "linear_num_key_heads": 2, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [],
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"attention_window_size": WINDOW, "lru_width": 64}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 64, "context_length": 256}),
    "zamba": ("ZambaConfig", {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 2,
        "num_key_value_heads": 4}),
}  # fmt: skip
