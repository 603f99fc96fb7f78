"""The doctor's reading room: what a head's files say about each other and about the target, without running anything.

Each finding names its cost and, where the files suffice to mend it, the repair that does (`fledge.export.repair`).
What only decoding can tell (a head trained at another rope base than its config says) is measured by
`fledge.bench.doctor`, which drops the findings here that its figures settle.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.draft.config import DraftConfig, derive
from fledge.draft.foreign import (
    d2t_from,
    known_fault,
    origin_of,
    read_any,
    read_config,
    read_weights,
    stated_tap_ids,
    t2d_from,
)
from fledge.draft.head import Head, check_tensors
from fledge.errors import UserError
from fledge.target.record import default_tap_layers

Severity = Literal["error", "warning"]
Topic = Literal["taps", "vocab", "rope", "norms", "tie", "positions", "dtype", "target"]


@dataclass(frozen=True)
class Finding:
    """One difference that costs something. `repair` says what --fix would do about it; empty: nothing."""

    severity: Severity
    topic: Topic
    what: str
    cost: str
    repair: str = ""


@dataclass(frozen=True)
class Examination:
    """A head as it lies there, damaged or not, and what is wrong with it."""

    folder: Path
    origin: str
    head: Head
    findings: list[Finding]
    vocabularies: dict[str, Tensor] = field(default_factory=dict)
    """(D,) offsets by where they come from; more than one where the files contradict each other"""


def examine(folder: Path, target_config: Any | None) -> Examination:
    """Read a head in any layout and compare its files with each other and with the target's text config."""
    document = read_config(folder)
    num_layers = None if target_config is None else target_config.num_hidden_layers
    try:
        head, unstated = read_any(folder, num_target_layers=num_layers, check=False), []
    except UserError as error:
        if not stated_tap_ids(document) or "--tap-convention" not in str(error):
            raise
        head = read_any(folder, num_target_layers=num_layers, tap_convention="input", check=False)
        unstated = [Finding("warning", "taps", f"tap ids {list(stated_tap_ids(document))} may be inputs or outputs of "
                            "layers; read as inputs", "accept length falls to about 1 if wrong")]  # fmt: skip
    vocabularies, vocab_findings, head = examine_vocab(head, read_weights(folder))
    check_tensors(head, folder)
    found = [*unstated, *vocab_findings, *_file_findings(document, head)]
    if target_config is not None:
        found += findings(head.config, target_config)
    origin = origin_of(document)
    if fault := known_fault(origin, head.config):
        topic: Topic = "norms" if origin.name == "SpecForge" else "rope"
        found.append(Finding("warning", topic, fault, "4 to 8 % accept length, and more at depth", "if measured"))
    return Examination(folder, origin.name, head, found, vocabularies)


def findings(config: DraftConfig, target_config: Any) -> list[Finding]:
    """What does not fit between a head's config and its target's text config."""
    found: list[Finding] = []

    def expect(
        severity: Severity, topic: Topic, name: str, head: Any, target: Any, cost: str, repair: str = ""
    ) -> None:  # fmt: skip
        if head != target:
            found.append(Finding(severity, topic, f"{name} is {head}, the target's is {target}", cost, repair))

    wanted = derive(target_config, vocab_size=config.vocab_size, tap_layers=config.tap_layers)
    expect("error", "target", "hidden_size", config.hidden_size, target_config.hidden_size,
           "cannot be served with this target")  # fmt: skip
    expect("error", "target", "vocab_size", config.vocab_size, target_config.vocab_size,
           "embeddings and d2t belong to another vocabulary")  # fmt: skip
    ours, theirs = config.rope_parameters, wanted.rope_parameters
    expect("warning", "rope", "rope theta", ours.get("rope_theta"), theirs.get("rope_theta"),
           "4 to 8 % accept length if it was trained at the target's", "if measured")  # fmt: skip
    expect("warning", "rope", "rope type", ours.get("rope_type", "default"), theirs.get("rope_type", "default"),
           "acceptance falls with the position", "if measured")  # fmt: skip
    expect("warning", "target", "head_dim", config.head_dim, wanted.head_dim,
           "fine if trained so; EAGLE derived it wrongly once")  # fmt: skip
    expect("warning", "target", "rms_norm_eps", config.rms_norm_eps, wanted.rms_norm_eps, "small")
    if config.max_position_embeddings < wanted.max_position_embeddings:
        expect("error", "positions", "max_position_embeddings", config.max_position_embeddings,
               wanted.max_position_embeddings, "engines crash on, or cut, longer prompts", "the target's")  # fmt: skip
    return [*found, *_tap_findings(config, target_config.num_hidden_layers), *_norm_findings(config)]


def examine_vocab(head: Head, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Finding], Head]:
    """d2t and t2d against each other. Returns the candidate d2t by origin, findings, and the head made consistent.

    Engines read d2t alone, so a wrong d2t drafts nothing while a wrong t2d only misleads training.
    """
    config, tensors = head.config, dict(head.tensors)
    if config.full_vocab or "d2t" not in tensors:
        return {}, [], head
    size, vocab_size = config.draft_vocab_size, config.vocab_size
    d2t, t2d = raw.get("d2t"), raw.get("t2d")
    swapped = d2t is not None and t2d is not None and len(d2t) == vocab_size != size and len(t2d) == size
    found: list[Finding] = []
    if swapped:
        assert d2t is not None and t2d is not None
        d2t, t2d = t2d, d2t
        found.append(_vocab_error("d2t and t2d are exchanged: each lies under the other's name", "exchanged back"))
    candidates: dict[str, Tensor] = {}
    ids = None if d2t is None else d2t.long() + torch.arange(len(d2t))
    if d2t is not None and len(d2t) == size and _usable(ids, vocab_size):
        candidates["d2t"] = d2t.long()
    if t2d is not None and len(t2d) == vocab_size and int(t2d.bool().sum()) == size:
        candidates["t2d"] = d2t_from(t2d.bool())
    if d2t is not None and len(d2t) == size and "d2t" not in candidates and _usable(d2t.long(), vocab_size):
        candidates["d2t"] = d2t.long() - torch.arange(size)
        found.append(_vocab_error("d2t holds target ids where offsets are meant", "offsets"))
    elif d2t is not None and "d2t" not in candidates:
        found.append(_vocab_error(f"d2t ({len(d2t)} entries for {size} draft tokens) names ids outside the vocabulary "
                                  "or one id twice", "rebuilt from t2d" if "t2d" in candidates else ""))  # fmt: skip
    if t2d is not None and "t2d" not in candidates:
        found.append(Finding("warning", "vocab", f"t2d holds {int(t2d.bool().sum())} tokens, {size} are needed",
                             "none in engines; training from it fails", "rebuilt from d2t"))  # fmt: skip
    if len(candidates) == 2 and not torch.equal(candidates["d2t"], candidates["t2d"]):
        differ = int((candidates["d2t"] != candidates["t2d"]).sum())
        found.append(_vocab_error(f"d2t and t2d name different tokens ({differ} of {size} rows): one is of another "
                                  "head", "the one that measures better"))  # fmt: skip
    if not candidates:
        raise UserError("neither d2t nor t2d names the head's draft vocabulary; it cannot be rebuilt from this file.")
    chosen = candidates.get("d2t", candidates.get("t2d"))
    assert chosen is not None
    mended = Head(config, tensors | {"d2t": chosen, "t2d": t2d_from(chosen, vocab_size)})
    if not found:  # consistent by the rules above; ascending order is what check_vocab adds
        check_vocab(mended.tensors["d2t"], mended.tensors["t2d"])
    return (candidates if found else {}), found, mended


def _usable(ids: Tensor | None, vocab_size: int) -> bool:
    """Whether these can be a draft vocabulary: inside, and ascending (so no id twice)."""
    return ids is not None and bool(((ids >= 0) & (ids < vocab_size)).all()) and bool((ids.diff() > 0).all())


def _vocab_error(what: str, repair: str) -> Finding:
    return Finding("error", "vocab", what, "engines translate draft tokens into wrong ones: acceptance 0", repair)


def _file_findings(document: dict[str, Any], head: Head) -> list[Finding]:
    """What config.json says beside the truth in the tensors."""
    found = []
    layer = {**document, **(document.get("transformer_layer_config") or {})}
    if layer.get("tie_word_embeddings"):
        found.append(Finding("error", "tie", "tie_word_embeddings is true, but the head has an lm_head of its own",
                             "SGLang drafts with the embedding instead: acceptance 0", "false"))  # fmt: skip
    floating = {str(t.dtype).removeprefix("torch.") for t in head.tensors.values() if t.is_floating_point()}
    stated = layer.get("dtype") or layer.get("torch_dtype")
    if len(floating) > 1:
        found.append(Finding("warning", "dtype", f"tensors of {', '.join(sorted(floating))} in one head",
                             "engines cast; tools that do not fail", "one dtype"))  # fmt: skip
    elif stated and str(stated).removeprefix("torch.") not in floating:
        found.append(Finding("warning", "dtype", f"dtype is {stated}, the tensors are {', '.join(floating)}",
                             "none where the engine is told a dtype", "the tensors'"))  # fmt: skip
    return found


def _tap_findings(config: DraftConfig, depth: int) -> list[Finding]:
    taps, usual = list(config.tap_layers), default_tap_layers(depth)
    if max(taps) >= depth:
        return [Finding("error", "taps", f"tap layers {taps} in a target of {depth} layers", "cannot be served")]
    if tuple(layer + 1 for layer in taps) == usual:
        return [Finding("error", "taps", f"tap layers {taps} look like layer *outputs*; as inputs the usual three are "
                        f"{list(usual)}", "accept length falls to about 1", "the usual three, unless measured "
                        "otherwise")]  # fmt: skip
    if tuple(taps) != usual:
        return [Finding("warning", "taps", f"tap layers {taps} are not the usual {list(usual)}",
                        "none if it was trained so; engines that ignore the ids use the usual ones",
                        "if measured")]  # fmt: skip
    return []


def _norm_findings(config: DraftConfig) -> list[Finding]:
    found = []
    if config.fc_norm != config.norm_output:
        found.append(Finding("warning", "norms", f"fc_norm={config.fc_norm} but norm_output={config.norm_output}",
                             "EAGLE-3.1 has both, EAGLE-3 neither", "if measured"))  # fmt: skip
    if config.norm_before_residual:
        found.append(Finding("warning", "norms", "norm_before_residual is set", "SGLang ignores it: another network"))
    return found
