"""Heads of other trainers, and of our own exports: whose they are, what their ids and names mean, read into our form.

A trainer is a row of `ORIGINS`. The trap is the tap ids: the same three layers are written as inputs (ours, vLLM,
speculators) or as outputs (SGLang, SpecForge, ModelOpt: one less), and nothing in most files says which. Where the
origin does not settle it, the target's depth does: both ways of writing the usual three are known. Anything else has
to be said by the user; nothing is guessed.

Read in: EAGLE (SafeAILab), AngelSlim (llama_eagle3.py), SpecForge 0.2.0, speculators 0.9.0, ModelOpt 0.47.0
(hf_spec_export.py, unified_export_megatron.py), vLLM 0.33.0 and SGLang 0.5.23 for what they serve.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from fledge.console import say, warn
from fledge.drafters.eagle3.config import QWEN3, DraftConfig, config_of_fields
from fledge.drafters.eagle3.head import WEIGHTS, Head, check_head, further_norm, read_tensors, renamed
from fledge.drafters.eagle3.head_file import read_document
from fledge.drafters.layer_config import JSON
from fledge.drafters.settings import TapConvention
from fledge.errors import UserError
from fledge.parsing import read_json
from fledge.target.record import default_tap_layers

TAP_IDS = "eagle_aux_hidden_state_layer_ids"
EAGLE_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3LLamaforCausalLM")
SPECULATORS_LAYERS = {"llama": False, "qwen3": True, None: False}  # model_type -> whether queries and keys are normed


@dataclass(frozen=True)
class Origin:
    """One trainer's way of writing a head."""

    name: str
    recognise: Callable[[JSON], bool]
    tap_ids: TapConvention
    """What its ids name; auto: its files are written both ways."""
    must_be: tuple[tuple[str, tuple[Any, ...], str], ...] = ()
    """(field, values we can express, what another value means); an absent field is fine."""
    warning: str = ""
    """What its heads are known to get wrong."""


def _eagle_config(document: JSON) -> JSON:
    return document.get("eagle_config") or {}


def _architecture(document: JSON) -> str:
    return (document.get("architectures") or ["?"])[0]


ORIGINS = (
    Origin("fledge", lambda document: isinstance(document.get("fledge"), dict), "auto"),
    Origin("speculators", lambda document: "speculators_model_type" in document, "input", must_be=(
        ("speculators_model_type", ("eagle3",), "another kind of speculator"),
        ("model_type", tuple(SPECULATORS_LAYERS), "a draft layer that is neither Llama's nor Qwen3's"),
    )),
    Origin("ModelOpt", lambda document: "next_layer_regular" in _eagle_config(document), "output", must_be=(
        ("use_aux_hidden_state", (True,), "an EAGLE-1 head"),
        ("use_input_layernorm_in_first_layer", (True, None), "no norm on the embedding"),
        ("use_last_layernorm", (True, None), "no norm before lm_head"),
        ("use_mtp_layernorm", (False, None), "an MTP module"),
        ("parallel_draft_step", (1, 0, None), "a parallel draft"),
    )),
    Origin("AngelSlim", lambda document: _architecture(document) in EAGLE_ARCHITECTURES[1:], "auto", warning=(
        "AngelSlim trains at rope base 10000 whatever its config says; `fledge inspect HEAD --target TARGET` measures "
        "which base this head knows, and --fix writes it")),
    Origin("SpecForge", lambda document: "norm_output" in document, "auto", warning=(
        "SpecForge 0.2 feeds the un-normed state back in training whatever norm_output says, and engines believe "
        "norm_output; `fledge inspect HEAD --target TARGET` measures both")),
    Origin("EAGLE or SpecForge", lambda document: True, "auto"),
)  # fmt: skip

# Common to all: a field, the values our head can express, and what another one means.
EXPRESSIBLE = (
    ("quantization_config", (None,), "quantised weights"),
    ("attention_bias", (False, None), "biases in the attention"),
    ("mlp_bias", (False, None), "biases in the MLP"),
    ("bias", (False, None), "a bias in fc"),
    ("norm_before_fc", (False, None), "one RMSNorm over all taps (gpt-oss style)"),
)
# What files hold besides the head: derived buffers, speculators' teacher.
DROPPED = (
    "rotary_emb.inv_freq", "midlayer.self_attn.rotary_emb.inv_freq", "verifier_norm.weight",
    "verifier_lm_head.weight",
)  # fmt: skip
PREFIXES = ("draft_model.", "eagle_module.", "model.")  # of training checkpoints
RENAMED = {"layers.0.": "midlayer.", "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.",
           "aux_norm_high.": "fc_norm.2."}  # fmt: skip


def read_any(
    folder: Path, *, num_target_layers: int | None = None, tap_convention: TapConvention = "auto", check: bool = True
) -> Head:
    """A head in any layout. Without `check` it may be damaged in its vocabulary or values (the doctor asks so)."""
    document = read_config(folder)
    origin = origin_of(document)
    layer = {**document, **(document.get("transformer_layer_config") or {})}
    tensors = renamed(read_weights(folder), our_name, folder)
    _refuse_other_generations(tensors, layer, folder)
    _refuse_inexpressible(origin, layer, document, folder)
    taps = tap_layers_of(document, origin, num_target_layers, tap_convention, folder)
    config = config_of(document, taps, num_target_layers, folder)
    _refuse_other_widths(tensors, layer, config, folder)
    kept = {name: tensor for name, tensor in tensors.items() if name not in DROPPED}
    head = Head(config, complete_vocab(kept, config))
    if check:
        check_head(head, folder)
        if fault := known_fault(origin, config):
            warn(f"{folder}: {fault}.")
    return head


def origin_of(document: JSON) -> Origin:
    """Whose head a config.json belongs to."""
    return next(origin for origin in ORIGINS if origin.recognise(document))


def known_fault(origin: Origin, config: DraftConfig) -> str:
    """What heads of this trainer are known to get wrong, where it can concern this one."""
    return origin.warning if origin.name != "SpecForge" or config.norm_output else ""


def our_name(name: str) -> str:
    """Our name of a tensor."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return further_norm(name)


def tap_layers_of(
    document: JSON, origin: Origin, num_layers: int | None, convention: TapConvention, folder: Path
) -> tuple[int, ...]:
    """The tap layers as inputs of decoder layers."""
    stated = stated_tap_ids(document)
    if not stated:
        if num_layers is None:
            raise UserError(
                f"{folder}: its config names no tap layers. Give --target, whose depth fixes the usual three."
            )
        return default_tap_layers(num_layers)
    meaning = origin.tap_ids if convention == "auto" else convention
    if origin.name == "fledge" and convention == "auto":
        meaning = "output" if str(document["fledge"].get("tap_convention", "")).startswith("output") else "input"
    outputs_read = tuple(layer + 1 for layer in stated)
    if meaning == "auto":
        usual = default_tap_layers(num_layers) if num_layers is not None else None
        if usual not in (stated, outputs_read):
            unknown = "the target is not given" if usual is None else f"the usual {list(usual)} fit neither"
            raise UserError(
                f"{folder}: its tap ids {list(stated)} may be inputs of layers (vLLM, speculators) or outputs (SGLang, "
                f"SpecForge), and {unknown}. Give --target, or say --tap-convention input or output; accept length "
                f"falls to about 1 when it is wrong."
            )
        meaning = "input" if stated == usual else "output"
        say(f"{folder}: tap ids {list(stated)} are {meaning}s of layers (the usual taps of {num_layers} layers)")
    return stated if meaning == "input" else outputs_read


def stated_tap_ids(document: JSON) -> tuple[int, ...]:
    """The ids a config states, in its own convention."""
    return tuple(document.get(TAP_IDS) or _eagle_config(document).get(TAP_IDS) or ())


def complete_vocab(tensors: dict[str, Tensor], config: DraftConfig) -> dict[str, Tensor]:
    """d2t and t2d in our types, the one that is absent made from the other; none for a whole vocabulary."""
    tensors = dict(tensors)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    for name, tensor in (("d2t", d2t), ("t2d", t2d)):
        if tensor is not None and (tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex()):
            raise UserError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed are integers (or bool), one row.")
    if config.full_vocab and (d2t is None or not d2t.any()) and (t2d is None or t2d.bool().all()):
        return tensors
    if d2t is None and t2d is not None:
        d2t = d2t_from(t2d.bool())
    if t2d is None and d2t is not None:
        t2d = t2d_from(d2t.long(), config.vocab_size)
    return tensors | {name: t for name, t in (("d2t", _as(d2t, torch.int64)), ("t2d", _as(t2d, torch.bool)))
                      if t is not None}  # fmt: skip


def d2t_from(t2d: Tensor) -> Tensor:
    """(D,) offsets of the tokens in t2d (V,)."""
    inside = t2d.nonzero().flatten()
    return inside - torch.arange(len(inside))


def t2d_from(d2t: Tensor, vocab_size: int) -> Tensor:
    """(V,) membership of the tokens that d2t (D,) names; ids outside the vocabulary are left out."""
    ids = d2t + torch.arange(len(d2t))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids[(ids >= 0) & (ids < vocab_size)]] = True
    return t2d


def read_config(folder: Path) -> JSON:
    """config.json as it stands, its fields checked."""
    return read_document(folder / "config.json")


class ShardIndex(msgspec.Struct):
    """model.safetensors.index.json"""

    weight_map: dict[str, Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+$")]]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, its shards, or the pytorch_model.bin of older heads (loaded as weights only)."""
    index, old = folder / f"{WEIGHTS}.index.json", folder / "pytorch_model.bin"
    if index.is_file() and not (folder / WEIGHTS).is_file():
        shards = sorted(set(read_json(index, ShardIndex).weight_map.values()))
        return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}
    if (folder / WEIGHTS).is_file() or not old.is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: neither {WEIGHTS} nor pytorch_model.bin is there. Is the download complete?")
        return read_tensors(folder / WEIGHTS)
    try:
        saved = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for a torn or unsafe file
        raise UserError(f"{old}: could not be read as weights ({error}). Download it again.") from None
    if not isinstance(saved, dict) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
        raise UserError(f"{old}: it is no dict of tensors. Save the head's state dict there.")
    return saved


def _refuse_inexpressible(origin: Origin, layer: JSON, document: JSON, folder: Path) -> None:
    for field, allowed, meaning in (*EXPRESSIBLE, *origin.must_be):
        value = layer.get(field, _eagle_config(document).get(field))
        if isinstance(value, (bool, int, str, type(None))) and value in allowed:
            continue
        raise UserError(
            f"{folder} ({origin.name}): {field}={value!r}, which is {meaning}. fledge's head is of Llama's "
            f"or Qwen3's layers as in the EAGLE-3 paper; this head cannot be expressed in it."
        )


def _refuse_other_generations(tensors: Mapping[str, Tensor], layer: JSON, folder: Path) -> None:
    """EAGLE and EAGLE-2 heads look alike at first: one layer, `fc`, often the same architecture's name."""
    fc, size = tensors.get("fc.weight"), layer.get("hidden_size")
    if fc is not None and size and fc.shape[-1] == 2 * size and "midlayer.hidden_norm.weight" not in tensors:
        raise UserError(
            f"{folder}: an EAGLE-1 or EAGLE-2 head (its fc joins the token's embedding with the target's last state "
            f"alone; EAGLE-3 reads several layers). fledge has no such head: use it where it was made, or train an "
            f"EAGLE-3 head with `fledge train`."
        )


def _refuse_other_widths(tensors: Mapping[str, Tensor], layer: JSON, config: DraftConfig, folder: Path) -> None:
    """A draft narrower or wider than its target; files state the target's width, or fc shows it."""
    fc, taps = tensors.get("fc.weight"), len(config.tap_layers)
    seen = fc.shape[-1] // taps if fc is not None and fc.ndim == 2 and fc.shape[-1] % taps == 0 else None
    width = layer.get("target_hidden_size") or seen
    if width not in (None, config.hidden_size):
        raise UserError(
            f"{folder}: a draft of hidden size {config.hidden_size} for a target of {width}. fledge's heads are as "
            f"wide as their target, so this head cannot be expressed; vLLM serves it as it is."
        )


def config_of(document: JSON, taps: Sequence[int], num_layers: int | None, folder: Path) -> DraftConfig:
    """Our config of a head, from a config.json in any layout; the tap layers are the caller's knowledge."""
    layer = {**document, **(document.get("transformer_layer_config") or {})}
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if absent := [key for key in needed if layer.get(key) is None]:
        raise UserError(f"{folder / 'config.json'}: {', '.join(absent)} missing; not the config of an EAGLE-3 head.")
    # vLLM takes an absent flag of the speculators layout as true; speculators itself always writes it
    before_residual = layer.get("norm_before_residual", "speculators_model_type" in document)
    return config_of_fields(
        layer, folder / "config.json", tap_layers=tuple(taps),
        fc_norm=bool(document.get("fc_norm") or document.get("use_aux_norm")),
        norm_before_residual=bool(before_residual),
        qk_norm=QWEN3 in (document.get("architectures") or ())
        or "speculators_model_type" in document and SPECULATORS_LAYERS.get(layer.get("model_type"), False),
        target_layers=(document.get("fledge") or {}).get("target_layers") or num_layers,
    )  # fmt: skip


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
