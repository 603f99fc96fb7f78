"""The law of a target's answers, from the flags and from what its generation_config asks for.

Knows settings. Knows nothing of logits: `accept.py` applies them.
"""

from collections.abc import Mapping
from typing import Any, Literal

from fledge.console import say
from fledge.data.sampling import ExtraSampling, read_generation_config, resolve_extra, shown
from fledge.decoding.records import Sampling
from fledge.errors import UserError

FromConfig = Literal["apply", "ignore"]
APPLIED = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "stop")  # in transformers' order
GREEDY = ("repetition_penalty", "stop")  # what counts at temperature 0
WHERE_DRAWN = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # change nothing at temperature 0


def law_of(
    target: str, *, temperature: float, top_p: float, flags: ExtraSampling, seed: int | None, from_config: FromConfig
) -> Sampling:
    """The sampling of a target: the flags, and its generation_config's top_k, min_p, repetition_penalty and stop
    strings where no flag is given. One line says what it is; what cannot be applied stops the run by its name."""
    asked = read_generation_config(target, download=True) or {} if from_config == "apply" else {}
    _refuse_unknown(target, asked, drawn=temperature > 0)
    law = sampling_of(resolve_extra(flags, asked), temperature=temperature, top_p=top_p, seed=seed)
    say(described(law, asked))
    return law


def sampling_of(extra: ExtraSampling, *, temperature: float, top_p: float, seed: int | None) -> Sampling:
    """Settings of which None means off."""
    return Sampling(
        temperature, top_p, extra.top_k or 0, seed, min_p=extra.min_p or 0.0,
        repetition_penalty=1.0 if extra.repetition_penalty is None else extra.repetition_penalty,
        stop=tuple(extra.stop or ()),
    )  # fmt: skip


def described(law: Sampling, asked: Mapping[str, Any]) -> str:
    """A sentence: the law, and where the flags overrule what the target asks for."""
    neutral = Sampling()
    used = {name: getattr(law, name) for name in APPLIED if getattr(law, name) != getattr(neutral, name)}
    if not law.temperature:
        used = {name: value for name, value in used.items() if name in GREEDY}
    words = ([] if law.temperature else ["greedy"]) + [f"{name} {shown(value)}" for name, value in used.items()]
    overruled = [
        f"{name} {shown(asked[name])}" for name in APPLIED if name in asked and asked[name] != getattr(law, name)
    ]
    more = f"; the target's generation_config asks for {', '.join(overruled)}: the flags decide" if overruled else ""
    return f"sampling: {', '.join(words)}{more}"


def _refuse_unknown(target: str, asked: Mapping[str, Any], *, drawn: bool) -> None:
    unknown = [name for name in asked if name not in APPLIED and (drawn or name not in WHERE_DRAWN)]
    if unknown:
        raise UserError(
            f"{target}: its generation_config sets {', '.join(unknown)}, which fledge does not apply, so its answers "
            f"would follow another law. `--generation-config ignore` decodes by the flags alone."
        )
