"""The doctor: what is wrong with a head, before an engine serves it at an acceptance of zero.

Compares the head's files with each other and its config with the target's. Nothing here runs a model; what only
decoding can tell (a head trained at another rope base than its config says) is `fledge bench`'s business.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fledge.console import say, show_table
from fledge.draft.config import DraftConfig, derive, to_json
from fledge.errors import UserError
from fledge.export.convert import read_head
from fledge.target.record import default_tap_layers


@dataclass(frozen=True)
class Finding:
    """One difference that costs something."""

    severity: Literal["error", "warning"]
    what: str
    cost: str


def findings(config: DraftConfig, target_config: Any) -> list[Finding]:
    """What does not fit between a head's config and its target's text config."""
    found: list[Finding] = []

    def expect(severity: Literal["error", "warning"], field: str, head: Any, target: Any, cost: str) -> None:
        if head != target:
            found.append(Finding(severity, f"{field} is {head}, the target's is {target}", cost))

    wanted = derive(target_config, vocab_size=config.vocab_size, tap_layers=config.tap_layers)
    expect("error", "hidden_size", config.hidden_size, target_config.hidden_size, "cannot be served with this target")
    expect("error", "vocab_size", config.vocab_size, target_config.vocab_size,
           "embeddings and d2t belong to another vocabulary")  # fmt: skip
    ours, theirs = config.rope_parameters, wanted.rope_parameters
    expect("warning", "rope theta", ours.get("rope_theta"), theirs.get("rope_theta"),
           "4 to 8 % accept length if it was trained at the target's; measure both with `fledge bench`")  # fmt: skip
    expect("warning", "rope type", ours.get("rope_type", "default"), theirs.get("rope_type", "default"),
           "acceptance falls with the position")  # fmt: skip
    expect("warning", "head_dim", config.head_dim, wanted.head_dim, "fine if trained so; EAGLE derived it wrongly once")
    expect("warning", "rms_norm_eps", config.rms_norm_eps, wanted.rms_norm_eps, "small")
    if config.max_position_embeddings < wanted.max_position_embeddings:
        expect("error", "max_position_embeddings", config.max_position_embeddings, wanted.max_position_embeddings,
               "vLLM crashes on longer prompts")  # fmt: skip
    depth = target_config.num_hidden_layers
    usual = default_tap_layers(depth)
    if max(config.tap_layers) >= depth:
        found.append(Finding("error", f"tap layers {list(config.tap_layers)} in a target of {depth} layers",
                             "cannot be served"))  # fmt: skip
    elif tuple(layer + 1 for layer in config.tap_layers) == usual:
        found.append(Finding("error", f"tap layers {list(config.tap_layers)} look like layer *outputs*; as inputs the "
                             f"usual three are {list(usual)}", "accept length falls to about 1"))  # fmt: skip
    elif tuple(config.tap_layers) != usual:
        found.append(Finding("warning", f"tap layers {list(config.tap_layers)} are not the usual {list(usual)}",
                             "none if it was trained so; engines that ignore the ids use the usual ones"))  # fmt: skip
    if config.fc_norm != config.norm_output:
        found.append(Finding("warning", f"fc_norm={config.fc_norm} but norm_output={config.norm_output}",
                             "EAGLE-3.1 has both, EAGLE-3 neither"))  # fmt: skip
    return found


def inspect_head(args: Any) -> None:
    """Print a head's config and, with --target, everything that does not fit it; errors end with status 1."""
    folder = Path(args.path)
    head = read_head(folder)  # complete, finite, d2t and t2d consistent, or an error
    show_table(str(folder), ["field", "value"], [[k, v] for k, v in to_json(head.config).items() if v is not None])
    dtypes = sorted({str(tensor.dtype) for name, tensor in head.tensors.items() if name not in ("d2t", "t2d")})
    say(f"{sum(t.numel() for t in head.tensors.values()) / 1e6:.1f} M values, {', '.join(dtypes)}; complete and finite")
    if args.target is None:
        say("give --target to compare it with the model it drafts for")
        return
    from transformers import AutoConfig

    found = findings(head.config, AutoConfig.from_pretrained(args.target).get_text_config())
    if not found:
        say(f"fits {args.target}")
        return
    show_table("findings", ["severity", "what", "cost"], [[f.severity, f.what, f.cost] for f in found])
    if any(finding.severity == "error" for finding in found):
        raise UserError(f"{folder}: does not fit {args.target} ({found[0].what}). The table says what each costs.")
