"""What a head's files say about each other and about the target, without running anything.

Each finding names its cost and, where the files suffice to mend it, the repair that does (`fledge.doctor.repair`).
What only decoding can tell (a head trained at another rope base than its config says) is measured by
`fledge.doctor.readings`; findings of the topics that it measured are dropped.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.doctor.findings import Finding, Severity, Topic
from fledge.doctor.vocab_check import examine_vocab
from fledge.drafters.eagle3.config import DraftConfig, derive
from fledge.drafters.eagle3.foreign import (
    known_fault,
    origin_of,
    our_name,
    read_any,
    read_config,
    read_weights,
    stated_tap_ids,
)
from fledge.drafters.eagle3.head import Head, check_head_tensors, renamed
from fledge.drafters.rope import described
from fledge.errors import UserError
from fledge.export.engine_rope import trained_rope
from fledge.target.record import default_tap_layers


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
    raw = renamed(read_weights(folder), our_name, folder)
    vocabularies, vocab_findings, head = examine_vocab(head, raw)
    check_head_tensors(head, folder)
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

    wanted = derive(target_config, vocab_size=config.vocab_size, tap_layers=(0,))  # taps: below
    expect("error", "target", "hidden_size", config.hidden_size, target_config.hidden_size,
           "cannot be served with this target")  # fmt: skip
    expect("error", "target", "vocab_size", config.vocab_size, target_config.vocab_size,
           "embeddings and d2t belong to another vocabulary")  # fmt: skip
    ours, theirs = config.rope_parameters, wanted.rope_parameters
    expect("warning", "rope", "rope theta", ours.get("rope_theta"), theirs.get("rope_theta"),
           "4 to 8 % accept length if it was trained at the target's", "if measured")  # fmt: skip
    expect("warning", "rope", "rope type", ours.get("rope_type", "default"), theirs.get("rope_type", "default"),
           "acceptance falls with the position", "if measured")  # fmt: skip
    expect("warning", "rope", "multimodal rope", described(ours), described(theirs),
           "acceptance falls behind pictures")  # fmt: skip
    if config.head_dim == wanted.head_dim and not any(finding.topic == "rope" for finding in found):
        if difference := trained_rope(config).difference(trained_rope(wanted)):
            found.append(Finding("warning", "rope", f"its rope {difference}, as the target's does",
                                 "acceptance falls with the position", "if measured"))  # fmt: skip
    expect("warning", "target", "head_dim", config.head_dim, wanted.head_dim,
           "fine if trained so; EAGLE derived it wrongly once")  # fmt: skip
    expect("warning", "target", "rms_norm_eps", config.rms_norm_eps, wanted.rms_norm_eps, "small")
    if config.max_position_embeddings < wanted.max_position_embeddings:
        expect("error", "positions", "max_position_embeddings", config.max_position_embeddings,
               wanted.max_position_embeddings, "engines crash on, or cut, longer prompts", "the target's")  # fmt: skip
    return [*found, *_tap_findings(config, target_config.num_hidden_layers), *_norm_findings(config)]


def _file_findings(document: dict[str, Any], head: Head) -> list[Finding]:
    """Where config.json and the tensors disagree."""
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
    if config.qk_norm:
        found.append(Finding("warning", "norms", "queries and keys are normed", "SGLang ignores it: another network"))
    return found
