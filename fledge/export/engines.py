"""What vLLM and SGLang read of a head, field by field, and what they do without a word when it is not there.

Both loaders skip unknown tensors and run with whatever a missing one left behind, so a wrong head serves happily at
an acceptance of zero. The tables are compared with the engines' own sources in the tests (tests/export/test_engines.py)
and `problems` looks for what they would swallow, from config.json and tensor names and shapes alone, before a server
starts. Read in vLLM 0.33.0 and SGLang 0.5.23, both in their models/llama_eagle3.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fledge.drafters.eagle3.checkpoint import WEIGHTS
from fledge.drafters.eagle3.foreign import TAP_IDS, config_of, our_name, read_config, read_weights, stated_tap_ids
from fledge.drafters.eagle3.head import FURTHER, expected_shapes
from fledge.errors import UserError
from fledge.export.engine_rope import rope_problem
from fledge.target.record import default_tap_layers

JSON = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ServingEngine:
    """One engine's reader. `reads` maps each config field to what an absent one means to it."""

    name: str
    title: str
    version: str
    tap_ids: Literal["input", "output"]
    reads: Mapping[str, str]
    skips: tuple[str, ...]
    """Tensors it passes over."""
    architectures: tuple[str, ...]


COMMON_READS = {
    "draft_vocab_size": "the whole vocabulary; SGLang then takes the target's lm_head",
    "eagle_config": "the usual three taps",
    "fc_norm": "no norm per tap",
    "hidden_size": "error",
    "norm_before_fc": "no norm over the taps",
    "norm_output": "the un-normed state is fed back",
    "num_aux_hidden_states": "as many as eagle_config lists, else three",
    "num_hidden_layers": "error",
    "rms_norm_eps": "error",
    "target_hidden_size": "hidden_size",
    "vocab_size": "error",
}
VLLM = ServingEngine(
    "vllm", "vLLM", "0.33.0", "input",
    reads={**COMMON_READS, "attention_bias": "no biases", "logit_scale": "1", "norm_before_residual":
           "the un-normed state is the residual (in the speculators layout: the normed one)"},
    skips=("t2d",),
    architectures=("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen2_5vlForCausalLM",
                   "Eagle3Qwen3vlForCausalLM", "Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen3ForCausalLM"),
)  # fmt: skip
SGLANG = ServingEngine(
    "sglang", "SGLang", "0.5.23", "output",
    reads={**COMMON_READS, "bias": "no bias in fc", "hidden_act": "error", "intermediate_size": "error",
           "intermediate_size_mlp": "read for llama4_text only", "model_type": "error",
           "rope_parameters": "rope_theta and rope_scaling", "rope_scaling": "no scaling",
           "tie_word_embeddings": "as the config class has it; true makes lm_head the embedding",
           "use_aux_norm": "an older name of fc_norm"},
    skips=("t2d",),
    architectures=("LlamaForCausalLMEagle3",),
)  # fmt: skip
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}
SPECULATORS_LAYERS = ("llama", "qwen3")


def problems(engine: ServingEngine, document: JSON, shapes: Shapes, target_config: Any | None = None) -> list[str]:
    """What this engine would crash on or serve at an acceptance of zero. `shapes` are the file's tensors."""
    speculators = "speculators_model_type" in document
    if speculators and engine.name != "vllm":
        return [f"the speculators layout is not read by {engine.title}"]
    found = _speculators_problems(document) if speculators else _plain_problems(engine, document)
    layer = {**document, **(document.get("transformer_layer_config") or {})} if speculators else document
    found += _tensor_problems(engine, document, {our_name(name): shape for name, shape in shapes.items()})
    found += _further_norm_problems(engine, shapes)
    found += _rope_problems(engine, document, layer)
    found += _tap_problems(engine, document, target_config, "input" if speculators else None)
    return found + (_target_problems(layer, target_config) if target_config is not None else [])


def check_servable(folder: Path, engine: ServingEngine, target_config: Any | None = None) -> None:
    """An error that lists every problem, or nothing."""
    document = read_config(folder)
    if found := problems(engine, document, file_shapes(folder), target_config):
        layout = engine.name
        raise UserError(
            f"{folder} would not draft in {engine.title} {engine.version}: {'; '.join(found)}. Write it for this "
            f"engine with `fledge export HEAD --to {layout}` (a head of another trainer: `fledge convert` first)."
        )


def file_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors, without reading their values where the format allows."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():  # shards, or the pytorch_model.bin of older heads
        return {name: tuple(tensor.shape) for name, tensor in read_weights(folder).items()}
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or export the head again.") from None


def _plain_problems(engine: ServingEngine, document: JSON) -> list[str]:
    architecture = (document.get("architectures") or ["none"])[0]
    found = []
    if architecture not in engine.architectures:
        found.append(f"architecture {architecture} is not one it reads as an EAGLE-3 head")
    if not document.get("model_type"):
        found.append("config.json has no model_type, so it cannot be loaded")
    if document.get("tie_word_embeddings"):
        found.append("tie_word_embeddings is true, though the head has an lm_head of its own")
    if engine.name == "sglang" and document.get("norm_before_residual"):
        found.append("norm_before_residual is set, which it ignores")
    return found


def _speculators_problems(document: JSON) -> list[str]:
    layer, found = document.get("transformer_layer_config"), []
    if document["speculators_model_type"] != "eagle3":
        found.append(f"speculators_model_type is {document['speculators_model_type']!r}, not eagle3")
    if not isinstance(layer, dict) or layer.get("model_type") not in SPECULATORS_LAYERS:
        found.append(f"transformer_layer_config with a model_type of {' or '.join(SPECULATORS_LAYERS)} is needed")
    if "model_type" in document:
        found.append("a model_type at the top level breaks the loading of a speculators config")
    config = document.get("speculators_config")
    methods = config.get("proposal_methods") if isinstance(config, dict) else None
    if (
        not methods
        or "speculative_tokens" not in methods[0]
        or "name_or_path" not in (config or {}).get("verifier", {})
    ):
        found.append("speculators_config with a proposal method's speculative_tokens and a verifier's name is needed")
    taps = stated_tap_ids(document)
    if isinstance(layer, dict) and taps and len(taps) != 3 and layer.get("num_aux_hidden_states") != len(taps):
        found.append(f"{len(taps)} taps need num_aux_hidden_states inside transformer_layer_config")
    return found


def _tensor_problems(engine: ServingEngine, document: JSON, shapes: Shapes) -> list[str]:
    """Tensors that are absent, or that it would pass over silently."""
    try:
        config = config_of(document, stated_tap_ids(document) or (0, 1, 2), None, Path("."))
    except UserError as error:
        return [str(error)]
    expected = {name: shape for name, shape in expected_shapes(config).items() if name not in engine.skips}
    if missing := sorted(expected.keys() - shapes.keys()):
        silent = "; it runs without them" if "lm_head.weight" in missing or "d2t" in missing else ""
        return [f"{', '.join(missing)} missing{silent}"]
    wrong = [f"{name} is {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes[name] != shape]
    allowed = expected.keys() | set(engine.skips) | {"embed_tokens.weight"}
    unknown = sorted(name for name in shapes.keys() - allowed if "rotary_emb" not in name)
    if unknown:
        wrong.append(f"unknown tensors {', '.join(unknown[:4])}")
    return wrong


def _further_norm_problems(engine: ServingEngine, shapes: Shapes) -> list[str]:
    """vLLM norms the states of layers behind the first by input_layernorm, SGLang by hidden_norm; the other is left."""
    read, left = ("hidden_norm", "input_layernorm") if engine.name == "sglang" else ("input_layernorm", "hidden_norm")
    names = [name for name in shapes if FURTHER.search(name) and f".{left}." in name]
    return [f"{names[0]} is passed over: it reads {read} there"] if names else []


def _rope_problems(engine: ServingEngine, document: JSON, layer: JSON) -> list[str]:
    """A rope that comes out of the same fields as other numbers than the head was trained with."""
    try:
        config = config_of(document, stated_tap_ids(document) or (0, 1, 2), None, Path("."))
        problem = rope_problem(engine.name, layer, config)
    except UserError:
        return []  # said by _tensor_problems
    return [f"its rope {config.rope_parameters} comes out differently in {engine.title}: {problem}"] if problem else []


def _tap_problems(engine: ServingEngine, document: JSON, target_config: Any | None, known: str | None) -> list[str]:
    """Ids in the other engine's convention (by our own mark, else by the target's usual three), or in a wrong place."""
    stated = stated_tap_ids(document)
    if not stated:
        return []
    usual = default_tap_layers(target_config.num_hidden_layers) if target_config is not None else stated
    if engine.name == "vllm" and TAP_IDS not in document and stated != usual:
        return [f"its tap ids {list(stated)} are in eagle_config only: vLLM's V2 runner would take {list(usual)}"]
    mark = str((document.get("fledge") or {}).get("tap_convention", ""))
    meaning = known or (mark.split()[0] if mark else None)
    shift = 1 if engine.tap_ids == "output" else 0
    if meaning is None and target_config is not None:
        read, other = tuple(i + shift for i in stated), tuple(i + 1 - shift for i in stated)
        meaning = None if read == usual or other != usual else ("input" if shift else "output")
    if meaning is not None and meaning != engine.tap_ids:
        return [f"its tap ids {list(stated)} name layer {meaning}s, {engine.title} reads them as {engine.tap_ids}s"]
    return []


def _target_problems(layer: JSON, target_config: Any) -> list[str]:
    found = []
    for field in ("hidden_size", "vocab_size"):
        head, target = layer.get(field), getattr(target_config, field)
        if head != target:
            found.append(f"{field} is {head}, the target's {target}")
    taps = stated_tap_ids(layer)
    if taps and max(taps) >= target_config.num_hidden_layers:
        found.append(f"tap ids {list(taps)} in a target of {target_config.num_hidden_layers} layers")
    return found
