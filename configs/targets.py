"""What is public about each target: the fields of its text config, its size, where that was read, and published tau.

Knows no code of ours; `make.py` turns a row into a draft config and a recipe. A field that could not be read in a
public source is not guessed: the row says so (`missing`) and gets a recipe, for which `fledge train` reads the
checkpoint itself, but no draft config. The tests build every row's model without weights and compare its size with
`params_b`.
"""

from dataclasses import dataclass
from typing import Any

LITGPT = "litgpt's config.py (Lightning-AI/litgpt 0006c97), which quotes the checkpoint's config.json"
SPECFORGE = "SpecForge's draft config for this target (sgl-project/SpecForge configs/)"
NNTERP = "the public notes of an interpretability library on hunyuan_v1_dense checkpoints (heads, vocabulary, rope)"
LLAMA_CPP_PR = "llama.cpp pull request 14425 (print_info of the checkpoint)"
ANGELSLIM_TAU = "docs/source/performance/speculative_decoding/benchmarks.md of Tencent/AngelSlim"
FOUR_SETS = "mean of GSM8K, Alpaca, HumanEval, MT-bench"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One target."""

    hub: str
    config_class: str
    """Config class of transformers. One with a text_config gets the fields there."""
    fields: dict[str, Any]
    params_b: float
    """Billions of parameters of the language model, embedding once, as the class builds it (checked by a test)."""
    active_b: float | None = None
    """Billions of parameters a token passes through; None: all (dense)."""
    source: str
    tau: str | None = None
    """Published accept length and where; None: nobody's figure was found."""
    missing: tuple[str, ...] = ()
    """Config fields no public source was found for."""
    vision: bool = False
    context: int = 2048
    """Tokens per training sample in the recipe."""


def sizes(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, context: int, *, tied: bool, **more: Any
) -> dict[str, Any]:
    """The fields every family has."""
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": context,
        "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def angelslim(mean: float, sets: str = FOUR_SETS) -> str:
    return f"{mean} published by AngelSlim for its own head ({sets}; vLLM, one GPU) in {ANGELSLIM_TAU}"


def qwen3(hidden: int, mlp: int, layers: int, heads: int, kv: int, *, tied: bool, **more: Any) -> dict[str, Any]:
    return sizes(
        hidden, mlp, layers, heads, kv, 151936, 40960, tied=tied, head_dim=128, rms_norm_eps=1e-6,
        rope_parameters=rope(1e6), **more,
    )  # fmt: skip


def qwen2(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, context: int, eps: float, *, tied: bool
) -> dict[str, Any]:
    return sizes(hidden, mlp, layers, heads, kv, vocab, context, tied=tied, rms_norm_eps=eps, rope_parameters=rope(1e6))


def qwen_vl(fields: dict[str, Any], *, interleaved: bool) -> dict[str, Any]:
    """The language model of a Qwen-VL: the text model's sizes, a rope of three axes."""
    if interleaved:
        axes = rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)
        return {**fields, "max_position_embeddings": 262144, "rope_parameters": axes}
    axes = rope(1e6, mrope_section=[16, 24, 24])
    return {**fields, "max_position_embeddings": 128000, "rope_parameters": axes}


def qwen3_5(
    hidden: int, layers: int, heads: int, kv: int, value_heads: int, *, tied: bool, **mlp: int
) -> dict[str, Any]:
    """The language model of Qwen3.5, 3.6 and 3.8: three gated delta nets for each full attention."""
    axes = rope(1e7, partial_rotary_factor=0.25, mrope_section=[11, 11, 10], mrope_interleaved=True)
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 262144, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_parameters": axes, "layer_types": QWEN3_5_BLOCK * (layers // 4),
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_value_heads": value_heads, "linear_conv_kernel_dim": 4, **mlp,
    }  # fmt: skip


def experts(count: int, per_token: int, width: int) -> dict[str, int]:
    return {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width}  # fmt: skip


def hunyuan(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    return sizes(
        hidden, mlp, layers, heads, kv, vocab, 262144, tied=True,
        **{"head_dim": 128, "rms_norm_eps": 1e-5, "rope_parameters": stretched, **more},
    )  # fmt: skip


def llama3(
    hidden: int, mlp: int, layers: int, heads: int, *, tied: bool, head_dim: int, factor: float
) -> dict[str, Any]:
    stretched = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return sizes(
        hidden, mlp, layers, heads, 8, 128256, 131072, tied=tied, head_dim=head_dim, rms_norm_eps=1e-5,
        rope_parameters=stretched,
    )  # fmt: skip


def gemma3(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, context: int, *, head_dim: int, window: int
) -> dict[str, Any]:
    full = rope(1e6) if context == 32768 else {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    return sizes(
        hidden, mlp, layers, heads, kv, vocab, context, tied=True, head_dim=head_dim, sliding_window=window,
        rope_parameters={"full_attention": full, "sliding_attention": rope(1e4)},
    )  # fmt: skip


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    stretched = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    return sizes(
        2880, 2880, layers, 64, 8, 201088, 131072, tied=False, head_dim=64, rms_norm_eps=1e-5,
        num_local_experts=experts, num_experts_per_tok=4, rope_parameters=stretched,
    )  # fmt: skip


GEMMA_SOURCE = f"{LITGPT}; vocabulary of 262208 rows: transformers' default and {SPECFORGE}"
QWEN3_VL = "the checkpoint's config.json as quoted in public code"
QWEN3_5 = f"{QWEN3_VL}; sizes: scripts/models of THUDM/slime"
QWEN3_5_BLOCK = ["linear_attention"] * 3 + ["full_attention"]
MTP_TAU = (
    "3.36 published for the EAGLE-3 head AQ-MedAI/Qwen3.5-397B-A17B-eagle3 (mean of MT-Bench,\n"
    "GSM8K, MATH-500, HumanEval; SGLang, batch 1), where the target's own MTP has 3.53"
)

TARGETS: dict[str, Row] = {
    "smollm2-135m": Row(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct", config_class="LlamaConfig", params_b=0.135,
        fields=sizes(576, 1536, 30, 9, 3, 49152, 8192, tied=True, head_dim=64, rms_norm_eps=1e-5,
                     rope_parameters=rope(1e5)),
        source=f"{LITGPT}; the checkpoint itself",
        tau="1.78 predicted, 1.79 measured, by us: 1760 answers, one pass, K = 3, full depth (dev/log, 2026-11-23)",
        context=1024),
    # ---- Qwen3 -------------------------------------------------------------------------------------------------------
    "qwen3-0.6b": Row(hub="Qwen/Qwen3-0.6B", config_class="Qwen3Config", params_b=0.596, source=LITGPT,
                      fields=qwen3(1024, 3072, 28, 16, 8, tied=True)),
    "qwen3-1.7b": Row(hub="Qwen/Qwen3-1.7B", config_class="Qwen3Config", params_b=1.72, source=LITGPT,
                      fields=qwen3(2048, 6144, 28, 16, 8, tied=True), tau=angelslim(2.17)),
    "qwen3-4b": Row(hub="Qwen/Qwen3-4B", config_class="Qwen3Config", params_b=4.02, source=LITGPT,
                    fields=qwen3(2560, 9728, 36, 32, 8, tied=True), tau=angelslim(2.08)),
    "qwen3-8b": Row(hub="Qwen/Qwen3-8B", config_class="Qwen3Config", params_b=8.19, source=LITGPT,
                    fields=qwen3(4096, 12288, 36, 32, 8, tied=False), tau=angelslim(1.99)),
    "qwen3-14b": Row(hub="Qwen/Qwen3-14B", config_class="Qwen3Config", params_b=14.8, source=LITGPT,
                     fields=qwen3(5120, 17408, 40, 40, 8, tied=False), tau=angelslim(1.79)),
    "qwen3-32b": Row(hub="Qwen/Qwen3-32B", config_class="Qwen3Config", params_b=32.8, source=LITGPT,
                     fields=qwen3(5120, 25600, 64, 64, 8, tied=False), tau=angelslim(1.91)),
    "qwen3-30b-a3b": Row(
        hub="Qwen/Qwen3-30B-A3B", config_class="Qwen3MoeConfig", params_b=30.5, active_b=3.3, source=LITGPT,
        fields=qwen3(2048, 6144, 48, 32, 4, tied=False, moe_intermediate_size=768, num_experts=128,
                     num_experts_per_tok=8), tau=angelslim(2.04)),
    "qwen3-235b-a22b": Row(
        hub="Qwen/Qwen3-235B-A22B", config_class="Qwen3MoeConfig", params_b=235, active_b=22, source=LITGPT,
        fields=qwen3(4096, 12288, 94, 64, 4, tied=False, moe_intermediate_size=1536, num_experts=128,
                     num_experts_per_tok=8)),
    # ---- Qwen3.5, 3.6 and 3.8: gated delta nets, chains only -------------------------------------------------------
    "qwen3.5-0.8b": Row(hub="Qwen/Qwen3.5-0.8B", config_class="Qwen3_5Config", params_b=0.75, vision=True, context=4096,
                        fields=qwen3_5(1024, 24, 8, 2, 16, tied=True, intermediate_size=3584), source=QWEN3_5),
    "qwen3.5-4b": Row(hub="Qwen/Qwen3.5-4B", config_class="Qwen3_5Config", params_b=4.21, vision=True, context=4096,
                      fields=qwen3_5(2560, 32, 16, 4, 32, tied=True, intermediate_size=9216), source=QWEN3_VL),
    "qwen3.5-9b": Row(hub="Qwen/Qwen3.5-9B", config_class="Qwen3_5Config", params_b=8.95, vision=True, context=4096,
                      fields=qwen3_5(4096, 32, 16, 4, 32, tied=False, intermediate_size=12288), source=QWEN3_VL),
    "qwen3.5-27b": Row(hub="Qwen/Qwen3.5-27B", config_class="Qwen3_5Config", params_b=26.9, vision=True, context=4096,
                       fields=qwen3_5(5120, 64, 24, 4, 48, tied=False, intermediate_size=17408), source=QWEN3_5),
    "qwen3.6-27b": Row(hub="Qwen/Qwen3.6-27B", config_class="Qwen3_5Config", params_b=26.9, vision=True, context=4096,
                       fields=qwen3_5(5120, 64, 24, 4, 48, tied=False, intermediate_size=17408), source=QWEN3_VL,
                       tau="2.2 published for the EAGLE-3 head Ex0bit/Qwen3.6-27B-PRISM-EAGLE3 (chain, SGLang 0.5.12)"),
    "qwen3.8-27b": Row(hub="Qwen/Qwen3.8-27B", config_class="Qwen3_5Config", params_b=26.9, vision=True, context=4096,
                       fields=qwen3_5(5120, 64, 24, 4, 48, tied=False, intermediate_size=17408), source=QWEN3_VL),
    "qwen3.5-35b-a3b": Row(
        hub="Qwen/Qwen3.5-35B-A3B", config_class="Qwen3_5MoeConfig", params_b=34.7, active_b=3.0, vision=True,
        context=4096, fields=qwen3_5(2048, 40, 16, 2, 32, tied=False, **experts(256, 8, 512)), source=QWEN3_5),
    "qwen3.6-35b-a3b": Row(
        hub="Qwen/Qwen3.6-35B-A3B", config_class="Qwen3_5MoeConfig", params_b=34.7, active_b=3.0, vision=True,
        context=4096, fields=qwen3_5(2048, 40, 16, 2, 32, tied=False, **experts(256, 8, 512)), source=QWEN3_5),
    "qwen3.5-122b-a10b": Row(
        hub="Qwen/Qwen3.5-122B-A10B", config_class="Qwen3_5MoeConfig", params_b=122.1, active_b=10.0, vision=True,
        context=4096, fields=qwen3_5(3072, 48, 32, 2, 64, tied=False, **experts(256, 8, 1024)), source=QWEN3_VL),
    "qwen3.5-397b-a17b": Row(
        hub="Qwen/Qwen3.5-397B-A17B", config_class="Qwen3_5MoeConfig", params_b=396.3, active_b=17.0, vision=True,
        context=4096, fields=qwen3_5(4096, 60, 32, 2, 64, tied=False, **experts(512, 10, 1024)), source=QWEN3_5,
        tau=MTP_TAU),
    # ---- Qwen2.5 -----------------------------------------------------------------------------------------------------
    "qwen2.5-0.5b": Row(hub="Qwen/Qwen2.5-0.5B-Instruct", config_class="Qwen2Config", params_b=0.494, source=LITGPT,
                        fields=qwen2(896, 4864, 24, 14, 2, 151936, 32768, 1e-6, tied=True)),
    "qwen2.5-1.5b": Row(hub="Qwen/Qwen2.5-1.5B-Instruct", config_class="Qwen2Config", params_b=1.54, source=LITGPT,
                        fields=qwen2(1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, tied=True)),
    "qwen2.5-3b": Row(hub="Qwen/Qwen2.5-3B-Instruct", config_class="Qwen2Config", params_b=3.09, source=LITGPT,
                      fields=qwen2(2048, 11008, 36, 16, 2, 151936, 32768, 1e-6, tied=True)),
    "qwen2.5-7b": Row(hub="Qwen/Qwen2.5-7B-Instruct", config_class="Qwen2Config", params_b=7.61, source=LITGPT,
                      fields=qwen2(3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, tied=False)),
    "qwen2.5-14b": Row(hub="Qwen/Qwen2.5-14B-Instruct", config_class="Qwen2Config", params_b=14.7, source=LITGPT,
                       fields=qwen2(5120, 13824, 48, 40, 8, 152064, 131072, 1e-5, tied=False)),
    "qwen2.5-32b": Row(hub="Qwen/Qwen2.5-32B-Instruct", config_class="Qwen2Config", params_b=32.5, source=LITGPT,
                       fields=qwen2(5120, 27648, 64, 40, 8, 152064, 131072, 1e-5, tied=False)),
    "qwen2.5-72b": Row(hub="Qwen/Qwen2.5-72B-Instruct", config_class="Qwen2Config", params_b=72.7, source=LITGPT,
                       fields=qwen2(8192, 29568, 80, 64, 8, 152064, 131072, 1e-5, tied=False)),
    # ---- Qwen-VL -----------------------------------------------------------------------------------------------------
    "qwen2.5-vl-3b": Row(
        hub="Qwen/Qwen2.5-VL-3B-Instruct", config_class="Qwen2_5_VLConfig", params_b=3.09, vision=True, context=4096,
        fields=qwen_vl(qwen2(2048, 11008, 36, 16, 2, 151936, 0, 1e-6, tied=True), interleaved=False),
        source=f"{SPECFORGE}; layers: Qwen2.5-3B, its language model, in {LITGPT}"),
    "qwen2.5-vl-7b": Row(
        hub="Qwen/Qwen2.5-VL-7B-Instruct", config_class="Qwen2_5_VLConfig", params_b=7.61, vision=True, context=4096,
        fields=qwen_vl(qwen2(3584, 18944, 28, 28, 4, 152064, 0, 1e-6, tied=False), interleaved=False),
        source=f"{SPECFORGE}; layers: Qwen2.5-7B, its language model, in {LITGPT}"),
    "qwen3-vl-2b": Row(
        hub="Qwen/Qwen3-VL-2B-Instruct", config_class="Qwen3VLConfig", params_b=1.72, vision=True, context=4096,
        fields=qwen_vl(qwen3(2048, 6144, 28, 16, 8, tied=True), interleaved=True), source=QWEN3_VL,
        tau=angelslim(2.51, "mean of GSM8K, Alpaca, HumanEval, MT-bench; 2.31 to 2.57 on MATH-500, MMMU, MMStar")),
    "qwen3-vl-4b": Row(
        hub="Qwen/Qwen3-VL-4B-Instruct", config_class="Qwen3VLConfig", params_b=4.02, vision=True, context=4096,
        fields=qwen_vl(qwen3(2560, 9728, 36, 32, 8, tied=True), interleaved=True), source=QWEN3_VL,
        tau=angelslim(2.50, "mean of GSM8K, Alpaca, HumanEval, MT-bench; 2.05 to 2.72 on MATH-500, MMMU, MMStar")),
    "qwen3-vl-8b": Row(
        hub="Qwen/Qwen3-VL-8B-Instruct", config_class="Qwen3VLConfig", params_b=8.19, vision=True, context=4096,
        fields=qwen_vl(qwen3(4096, 12288, 36, 32, 8, tied=False), interleaved=True), source=QWEN3_VL),
    "qwen3-vl-32b": Row(
        hub="Qwen/Qwen3-VL-32B-Instruct", config_class="Qwen3VLConfig", params_b=32.8, vision=True, context=4096,
        fields=qwen_vl(qwen3(5120, 25600, 64, 64, 8, tied=False), interleaved=True), source=QWEN3_VL),
    "qwen3-vl-30b-a3b": Row(
        hub="Qwen/Qwen3-VL-30B-A3B-Instruct", config_class="Qwen3VLMoeConfig", params_b=30.5, active_b=3.3,
        vision=True, context=4096, source=QWEN3_VL,
        fields=qwen_vl(qwen3(2048, 6144, 48, 32, 4, tied=False, moe_intermediate_size=768, num_experts=128,
                             num_experts_per_tok=8), interleaved=True),
        tau=angelslim(2.43, "mean of GSM8K, Alpaca, HumanEval, MT-bench; 1.78 to 2.79 on MATH-500, MMMU, MMStar")),
    # ---- Hunyuan -----------------------------------------------------------------------------------------------------
    "hunyuan-0.5b": Row(
        hub="tencent/Hunyuan-0.5B-Instruct", config_class="HunYuanDenseV1Config", params_b=0.539,
        fields=hunyuan(1024, 3584, 24, 16, 8, 120818),
        source=f"{NNTERP}; MLP size: HunyuanOCR's language model, which is this one, in mlx-vlm"),
    "hunyuan-1.8b": Row(
        hub="tencent/Hunyuan-1.8B-Instruct", config_class="HunYuanDenseV1Config", params_b=1.79,
        fields=hunyuan(2048, 6144, 32, 16, 4, 120818),
        source=f"{NNTERP}; layers and MLP size: GGUF metadata of Hy-MT2-1.8B, the same network, in public code"),
    "hunyuan-4b": Row(
        hub="tencent/Hunyuan-4B-Instruct", config_class="HunYuanDenseV1Config", params_b=4.2,
        fields=hunyuan(3072, 0, 0, 32, 8, 120818), missing=("intermediate_size", "num_hidden_layers"),
        source=f"{NNTERP}; hidden size: llama.cpp's size table"),
    "hunyuan-7b": Row(
        hub="tencent/Hunyuan-7B-Instruct", config_class="HunYuanDenseV1Config", params_b=7.5,
        fields=hunyuan(4096, 14336, 32, 32, 8, 128167), source=f"{NNTERP}; sizes: public tests that quote its config"),
    "hunyuan-a13b": Row(
        hub="tencent/Hunyuan-A13B-Instruct", config_class="HunYuanMoEV1Config", params_b=80.4, active_b=13,
        fields=hunyuan(4096, 3072, 32, 32, 8, 128167, num_experts=64, moe_topk=8), source=LLAMA_CPP_PR),
    "hunyuan-ocr": Row(
        hub="tencent/HunyuanOCR", config_class="HunYuanVLConfig", params_b=0.539, vision=True, context=8192,
        fields=hunyuan(1024, 3584, 24, 16, 8, 120818) | {
            "max_position_embeddings": 32768, "rope_parameters": {
                "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0,
                "mrope_section": [16, 16, 16, 16]}},
        source="mlx-vlm's configuration of this model (Blaizzy/mlx-vlm mlx_vlm/models/hunyuan_vl/config.py)",
        tau=angelslim(2.08, "OmniDocBench")),
    # ---- Llama 3.x ---------------------------------------------------------------------------------------------------
    "llama-3.1-8b": Row(hub="meta-llama/Llama-3.1-8B-Instruct", config_class="LlamaConfig", params_b=8.03,
                        fields=llama3(4096, 14336, 32, 32, tied=False, head_dim=128, factor=8.0), source=LITGPT),
    "llama-3.1-70b": Row(hub="meta-llama/Llama-3.1-70B-Instruct", config_class="LlamaConfig", params_b=70.6,
                         fields=llama3(8192, 28672, 80, 64, tied=False, head_dim=128, factor=8.0), source=LITGPT),
    "llama-3.2-1b": Row(hub="meta-llama/Llama-3.2-1B-Instruct", config_class="LlamaConfig", params_b=1.24,
                        fields=llama3(2048, 8192, 16, 32, tied=True, head_dim=64, factor=32.0), source=LITGPT),
    "llama-3.2-3b": Row(hub="meta-llama/Llama-3.2-3B-Instruct", config_class="LlamaConfig", params_b=3.21,
                        fields=llama3(3072, 8192, 28, 24, tied=True, head_dim=128, factor=32.0), source=LITGPT),
    "llama-3.3-70b": Row(hub="meta-llama/Llama-3.3-70B-Instruct", config_class="LlamaConfig", params_b=70.6,
                         fields=llama3(8192, 28672, 80, 64, tied=False, head_dim=128, factor=8.0), source=LITGPT),
    # ---- gpt-oss -----------------------------------------------------------------------------------------------------
    "gpt-oss-20b": Row(hub="openai/gpt-oss-20b", config_class="GptOssConfig", params_b=20.9, active_b=3.6,
                       fields=gpt_oss(24, 32), source="public tests that quote its config; rope: GptOssConfig"),
    "gpt-oss-120b": Row(hub="openai/gpt-oss-120b", config_class="GptOssConfig", params_b=116.8, active_b=5.1,
                        fields=gpt_oss(36, 128), source="transformers' GptOssConfig, whose defaults are this model"),
    # ---- Gemma 3 -----------------------------------------------------------------------------------------------------
    "gemma-3-1b": Row(hub="google/gemma-3-1b-it", config_class="Gemma3TextConfig", params_b=1.0,
                      fields=gemma3(1152, 6912, 26, 4, 1, 262144, 32768, head_dim=256, window=512),
                      source=f"{LITGPT}; context: {SPECFORGE}"),
    "gemma-3-4b": Row(hub="google/gemma-3-4b-it", config_class="Gemma3Config", params_b=3.88, vision=True,
                      fields=gemma3(2560, 10240, 34, 8, 4, 262208, 131072, head_dim=256, window=1024),
                      source=GEMMA_SOURCE),
    "gemma-3-12b": Row(hub="google/gemma-3-12b-it", config_class="Gemma3Config", params_b=11.8, vision=True,
                       fields=gemma3(3840, 15360, 48, 16, 8, 262208, 131072, head_dim=256, window=1024),
                       source=GEMMA_SOURCE),
    "gemma-3-27b": Row(hub="google/gemma-3-27b-it", config_class="Gemma3Config", params_b=27.0, vision=True,
                       fields=gemma3(5376, 21504, 62, 32, 16, 262208, 131072, head_dim=128, window=1024),
                       source=GEMMA_SOURCE),
}  # fmt: skip
