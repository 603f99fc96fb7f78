"""Targets that cannot follow everything: tiny random models, and what decoding makes of each."""

from typing import Any

from tiny import COMMON, MAMBA, VOCAB, WINDOW

LIMIT = 32
LONGROPE: dict[str, Any] = {"rope_parameters": {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [4.0 + n for n in range(8)],
    "original_max_position_embeddings": LIMIT}, "original_max_position_embeddings": LIMIT}
MLA: dict[str, Any] = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3_longrope": ("Phi3Config", LONGROPE),
    "phimoe_longrope": ("PhimoeConfig", {"num_local_experts": 4, "rope_parameters": {**LONGROPE["rope_parameters"], "short_mscale": 1.0, "long_mscale": 1.2}, "original_max_position_embeddings": LIMIT}),
    "jamba": ("JambaConfig", {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "num_experts": 4, "num_experts_per_tok": 2,
         "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "expansion_ratio": 2}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 4}),
    "falcon": ("FalconConfig", {}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False}),
    "doge": ("DogeConfig", {"keep_window_size": 8}),
    "doge_eager": ("DogeConfig", {"keep_window_size": 8, "attn_implementation": "eager"}),
    "moshi": ("MoshiConfig", {"audio_vocab_size": 32, "num_codebooks": 2}),
    "llama4": ("Llama4TextConfig", {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW}),
    "gemma3n": ("Gemma3nTextConfig", {"head_dim": 16, "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4, "layer_types": ["sliding_attention", "full_attention"]*2, "activation_sparsity_pattern": [0.0]*4, "intermediate_size": [96]*4}),
    "deepseek_v32": ("DeepseekV32Config", {**MLA, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {**MLA, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}),
    "nemotron_h": ("NemotronHConfig", {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,"conv_kernel": 4}),
    "zamba2": ("Zamba2Config", {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "use_mem_rope": True}),
    "gemma4": ("Gemma4TextConfig", {"head_dim": 16, "global_head_dim": 16, "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]*2}),
    "gemma4_shared": ("Gemma4TextConfig", {"head_dim": 16, "global_head_dim": 16, "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"]*2}),
    "glm4_moe": ("Glm4MoeConfig", {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "minimax_m2": ("MiniMaxM2Config", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "exaone4": ("Exaone4Config", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]*2}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]*2}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}),
    "minimax": ("MiniMaxConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 64, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]}),
    "olmo_hybrid": ("OlmoHybridConfig", {"layer_types": ["linear_attention", "full_attention"]*2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 4}),
    "qwen3_5": ("Qwen3_5TextConfig", {"head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]*2}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 256}),
    "ministral3": ("Ministral3Config", {"head_dim": 16, "sliding_window": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": LIMIT, "llama_4_scaling_beta": 0.5, "beta_fast": 32., "beta_slow": 1., "mscale": 1.0, "mscale_all_dim": 1.0, "max_position_embeddings": 256}}),
    "dynamic_ntk": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64}),
}
