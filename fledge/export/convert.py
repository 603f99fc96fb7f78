"""Heads from and to other programs' layouts. The round trip is the identity on tensors; an unknown key is an error."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from fledge import provenance
from fledge.console import say
from fledge.data.vocab import check_vocab
from fledge.draft.checkpoint import WEIGHTS, read_tensors
from fledge.draft.config import DraftConfig, from_json, to_json
from fledge.errors import UserError
from fledge.export.layouts import LAYOUTS, Layout
from fledge.target.record import default_tap_layers

# What foreign files hold besides the head: the target's embedding (bound at run time) and derived buffers.
DROPPED = ("embed_tokens.weight", "rotary_emb.inv_freq", "midlayer.self_attn.rotary_emb.inv_freq")
TapConvention = Literal["input", "output"]


@dataclasses.dataclass(frozen=True)
class Head:
    """A head in our names, without a target."""

    config: DraftConfig
    tensors: dict[str, Tensor]


def read_head(folder: Path) -> Head:
    """A head of ours (the EAGLE layout)."""
    head = Head(from_json(folder / "config.json"), read_tensors(folder / WEIGHTS))
    check_head(head, folder)
    return head


def read_foreign(
    folder: Path, *, num_target_layers: int | None, tap_convention: TapConvention, overrides: dict[str, Any]
) -> Head:
    """A head of EAGLE, AngelSlim, SpecForge or speculators. Tap ids they leave out are the usual three."""
    document = _json(folder / "config.json")
    speculators = "speculators_model_type" in document
    layout = LAYOUTS["speculators" if speculators else "eagle"]
    layer = {**document, **document["transformer_layer_config"]} if speculators else document
    if layer.get("norm_before_residual", speculators) or layer.get("norm_before_fc"):
        raise UserError(
            f"{folder}: norm_before_residual or norm_before_fc is set. fledge's head keeps the un-normed residual, as "
            f"the EAGLE-3 paper does; this head cannot be expressed in it."
        )
    taps = _taps(document, num_target_layers, tap_convention, folder)
    config = _config(layer, document, taps, num_target_layers, overrides, folder)
    tensors = {layout.our_name(name): tensor for name, tensor in _foreign_tensors(folder).items()}
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    head = Head(config, {name: tensor for name, tensor in tensors.items() if name not in DROPPED})
    check_head(head, folder)
    return head


def write_head(head: Head, folder: Path, layout: Layout, target: str) -> None:
    """Write a head in a layout, weights last, under a temporary name until complete."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(head.tensors["fc.weight"].dtype).removeprefix("torch.")
    provenance.write_json(folder / "config.json", layout.describe(head.config, dtype, target))
    renamed = {layout.tensor_name(name): tensor.contiguous() for name, tensor in head.tensors.items()}
    temporary = folder / (WEIGHTS + ".tmp")
    save_file(renamed, str(temporary), metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete head."""
    size, inner, taps = config.hidden_size, config.intermediate_size, len(config.tap_layers)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, taps * size),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * size),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, q),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        "lm_head.weight": (config.draft_vocab_size, size),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{tap}.weight": (size,) for tap in range(taps)}
    if not config.full_vocab:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def check_head(head: Head, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, finite, d2t and t2d each other's inverse."""
    expected = expected_shapes(head.config)
    missing, unknown = sorted(expected.keys() - head.tensors.keys()), sorted(head.tensors.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
        raise UserError(f"{folder}: not the tensors of an EAGLE-3 head ({'; '.join(parts)}).")
    for name, shape in expected.items():
        tensor = head.tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, its config.json asks for {shape}.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} contains NaN or infinity. Use an earlier checkpoint.")
    if not head.config.full_vocab:
        check_vocab(head.tensors["d2t"], head.tensors["t2d"], source=str(folder))


def _taps(document: dict[str, Any], num_layers: int | None, convention: TapConvention, folder: Path) -> tuple[int, ...]:
    stated = document.get("eagle_aux_hidden_state_layer_ids") or (document.get("eagle_config") or {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    if stated:
        return tuple(layer + (convention == "output") for layer in stated)
    if num_layers is None:
        raise UserError(f"{folder}: its config names no tap layers. Give --target, whose depth fixes the usual three.")
    return default_tap_layers(num_layers)


def _config(
    layer: dict[str, Any], document: dict[str, Any], taps: Sequence[int], num_layers: int | None,
    overrides: dict[str, Any], folder: Path,
) -> DraftConfig:  # fmt: skip
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if absent := [key for key in needed if layer.get(key) is None]:
        raise UserError(f"{folder / 'config.json'}: {', '.join(absent)} missing; not the config of an EAGLE-3 head.")
    rope = layer.get("rope_parameters") or {
        "rope_type": "default", "rope_theta": layer.get("rope_theta", 10_000.0), **(layer.get("rope_scaling") or {}),
    }  # fmt: skip
    heads = layer["num_attention_heads"]
    values = {
        "hidden_size": layer["hidden_size"],
        "intermediate_size": layer["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": layer.get("num_key_value_heads") or heads,
        "head_dim": layer.get("head_dim") or layer["hidden_size"] // heads,
        "vocab_size": layer["vocab_size"],
        "draft_vocab_size": document.get("draft_vocab_size") or layer["vocab_size"],
        "tap_layers": tuple(taps),
        "rope_parameters": rope,
        "rms_norm_eps": layer.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": layer.get("max_position_embeddings", 8192),
        "hidden_act": layer.get("hidden_act", "silu"),
        "fc_norm": bool(document.get("fc_norm", False)),
        "norm_output": bool(document.get("norm_output", False)),
        "target_layers": num_layers,
    }
    return DraftConfig(**{**values, **overrides})


def _foreign_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, or the pytorch_model.bin of older heads (loaded as weights only)."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    old = folder / "pytorch_model.bin"
    if not old.is_file():
        raise UserError(f"{folder}: neither {WEIGHTS} nor pytorch_model.bin is there. Is the download complete?")
    try:
        return torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for a torn or unsafe file
        raise UserError(f"{old}: could not be read as weights ({error}). Download it again.") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. A head is a folder with config.json and its weights.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArgs:
    head: Annotated[str, tyro.conf.Positional]
    """The head's folder."""
    to: Literal["vllm", "sglang", "speculators", "eagle"]
    """Who will read it."""
    output_dir: Path
    """Where to write."""
    target: str = ""
    """The target's name as it will be served; written into the speculators config and the serve command."""


def export_head(args: ExportArgs) -> None:
    """Write a head in the layout an engine reads, and print the command that serves it."""
    head, layout = read_head(Path(args.head)), LAYOUTS[args.to]
    if args.to == "speculators" and not args.target:
        raise UserError("--target is needed for --to speculators: its config names the target.")
    write_head(head, args.output_dir, layout, args.target)
    provenance.write(args.output_dir / "export.json", dataclasses.asdict(args), source=args.head)
    say(f"written: {args.output_dir}")
    say(layout.serve.replace("TARGET", args.target or "TARGET").replace("HEAD", str(args.output_dir)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    head: Annotated[str, tyro.conf.Positional]
    """A head of EAGLE, AngelSlim, SpecForge or speculators."""
    output_dir: Path
    """Where to write fledge's form of it."""
    target: str | None = None
    """The target's folder or hub name: its depth fixes tap layers the head does not name."""
    tap_convention: TapConvention = "input"
    """What its tap ids mean: input of layer i (vLLM, speculators) or output of layer i (SGLang, SpecForge)."""
    rope_theta: float | None = None
    """The rope base the head was trained with, where its config states another."""


def convert_head(args: ConvertArgs) -> None:
    """Bring another trainer's head into fledge's form, so that it can be measured, continued and exported."""
    num_layers = None
    if args.target:
        from transformers import AutoConfig

        num_layers = AutoConfig.from_pretrained(args.target).get_text_config().num_hidden_layers
    head = read_foreign(Path(args.head), num_target_layers=num_layers, tap_convention=args.tap_convention, overrides={})
    if args.rope_theta:
        rope = {**head.config.rope_parameters, "rope_theta": args.rope_theta}
        head = dataclasses.replace(head, config=dataclasses.replace(head.config, rope_parameters=rope))
    write_head(head, args.output_dir, LAYOUTS["eagle"], args.target or "")
    provenance.write(args.output_dir / "convert.json", dataclasses.asdict(args), head=to_json(head.config))
    say(f"written: {args.output_dir}; taps are inputs of layers {list(head.config.tap_layers)}")
