"""How other programs name and configure an EAGLE-3 head: one row per layout, nothing else differs.

fledge's own checkpoint *is* the EAGLE layout (docs/eagle3.md, 8) with tap ids as inputs of decoder layers. A layout
says how tensor names, tap ids and config differ from it, and what its reader ignores. Read in: vLLM 0.33.0
(llama_eagle3.py, transformers_utils/configs/speculators), SGLang 0.5.23 (its models/llama_eagle3.py adds 1 to the ids
in eagle_config: they name layer *outputs*), speculators 0.9.0, SpecForge 0.2.0, the EAGLE repository, llama.cpp b11434
(conversion/llama.py, src/models/eagle3.cpp).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fledge.drafters.eagle3.config import DraftConfig, to_json
from fledge.drafters.eagle3.head import EMBEDDING, Head
from fledge.errors import UserError
from fledge.export.engine_rope import trained_rope

JSON = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One way to write a head."""

    name: str
    describe: Callable[[DraftConfig, str, str], JSON]  # config, dtype, target name -> config.json
    layer_prefix: str = "midlayer."
    ignores: tuple[str, ...] = ()
    """Config fields its reader does not know, though a head that sets them is another function."""
    replaces_embedding: bool = False
    """Its reader takes the target's embedding, whatever the file brings."""
    serve: str = ""
    """The command that serves HEAD with TARGET."""
    reader: str = "vLLM"
    """The engine that reads it, as people call it."""
    window_flag: str = ""
    """The flag that tells a sliding window where config.json does not; it counts the keys before the query's own."""
    also_lost: Callable[[DraftConfig], list[str]] = lambda config: []
    """What else of a config its reader passes over, in words."""
    further_norm: str = "input_layernorm"
    """What the norm before the attention is called in layers behind the first."""

    def command(self, config: DraftConfig) -> str:
        """What serves HEAD with TARGET."""
        return " ".join([self.serve, *self.options(config)])

    def options(self, config: DraftConfig) -> list[str]:
        """What this head needs on that command line."""
        if config.sliding_window is None or not self.window_flag:
            return []
        return [f"{self.window_flag} {config.sliding_window - 1}"]

    def tensor_name(self, ours: str) -> str:
        """The layout's name of one of our tensors."""
        if ours.startswith("midlayer."):
            return ours.replace("midlayer.", self.layer_prefix, 1)
        return ours.replace("input_layernorm", self.further_norm) if ours.startswith("layers.") else ours

    def refuse(self, head: Head) -> None:
        """An error when the layout's reader would run another network than the head was trained as."""
        lost = [field for field in self.ignores if getattr(head.config, field)] + self.also_lost(head.config)
        if self.replaces_embedding and EMBEDDING in head.tensors:
            lost.append(f"an embedding of its own ({EMBEDDING})")
        if lost:
            raise UserError(
                f"the head has {', '.join(lost)}, which the reader of the {self.name} layout ignores: it would draft "
                f"with another network. Export it for vLLM, or train a head without it."
            )


def _eagle_config(config: DraftConfig, dtype: str, target: str) -> JSON:
    return to_json(config, dtype=dtype)


def _sglang_config(config: DraftConfig, dtype: str, target: str) -> JSON:
    document = to_json(config, dtype=dtype)
    outputs = [layer - 1 for layer in config.tap_layers]
    document["eagle_aux_hidden_state_layer_ids"] = outputs
    document["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = outputs
    document["fledge"]["tap_convention"] = "output of decoder layer i"
    _state_yarn_scale(document["rope_parameters"], config)
    return document


def _state_yarn_scale(rope: JSON, config: DraftConfig) -> None:
    """SGLang scales cos and sin by a number of its own and by `attn_factor`; it does not read `attention_factor`."""
    if rope.get("rope_type") == "yarn" and rope.get("attention_factor") is not None:
        own = trained_rope(replace(config, rope_parameters={**rope, "attention_factor": None})).scale
        rope["attn_factor"] = rope["attention_factor"] / own


def _speculators_config(config: DraftConfig, dtype: str, target: str) -> JSON:
    """No top-level model_type (it breaks loading); norm_before_residual counts as true when absent."""
    layer = to_json(config, dtype=dtype)
    layer.pop("norm_before_residual", None)
    for key in ("architectures", "eagle_config", "eagle_aux_hidden_state_layer_ids", "fledge", "target_hidden_size",
                "draft_vocab_size", "fc_norm", "norm_output"):  # fmt: skip
        layer.pop(key)
    layer["num_aux_hidden_states"] = len(config.tap_layers)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(config.tap_layers),
        "transformer_layer_config": layer,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _lost_in_llama_cpp(config: DraftConfig) -> list[str]:
    """Its converter writes whole heads rotated in one of three ways, and its network reads three taps."""
    rope, taps = config.rope_parameters, len(config.tap_layers)
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    return [
        *([f"{config.num_layers} decoder layers (one is read)"] if config.num_layers > 1 else []),
        *([f"{taps} taps (three are read)"] if taps != 3 else []),
        *([f"a {kind!r} rope"] if kind not in ("default", "linear", "llama3") else []),
        *([f"a partial_rotary_factor of {share}"] if share not in (None, 1.0) else []),
    ]


VLLM = (  # without "method" vLLM 0.32 crashes
    "vllm serve TARGET --speculative-config "
    """'{"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3}'"""
)
SGLANG = (
    "python3 -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 "
    "--speculative-draft-model-path HEAD --speculative-num-steps 5 --speculative-eagle-topk 8 "
    "--speculative-num-draft-tokens 32"
)
LLAMA_CPP = (  # run in llama.cpp's folder; the target's own GGUF file is made by the same converter
    "python convert_hf_to_gguf.py HEAD --target-model-dir TARGET --outtype bf16 --outfile draft.gguf && "
    "llama-server -m target.gguf -md draft.gguf --spec-type draft-eagle3 --spec-draft-n-max 3"
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("vllm", _eagle_config, serve=VLLM),
        Layout(
            "sglang",
            _sglang_config,
            ignores=("norm_before_residual", "qk_norm"),
            replaces_embedding=True,
            further_norm="hidden_norm",
            serve=SGLANG,
            reader="SGLang",
            window_flag="--speculative-draft-window-size",
        ),
        Layout("speculators", _speculators_config, layer_prefix="layers.0.", serve="vllm serve HEAD"),
        Layout("eagle", _eagle_config, serve=VLLM),
        Layout(
            "llama.cpp",
            _eagle_config,
            ignores=("fc_norm", "norm_output", "qk_norm", "sliding_window"),
            serve=LLAMA_CPP,
            reader="llama.cpp",
            also_lost=_lost_in_llama_cpp,
        ),
    )
}
