"""How answers are sampled: what the target's generation_config asks for, and what is drawn per row.

A draw is a number in [0, 1) from a purpose, the run's seed and the row's id. No generator has a state here, so a row
draws the same in a resumed run, on another machine and in any order.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from fledge.errors import UserError
from fledge.parsing import read_json


def fraction(purpose: str, seed: int, row_id: str) -> float:
    """Uniform in [0, 1), the same for the same three arguments."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class TemperatureMixture:
    """Temperatures and how often each is drawn."""

    temperatures: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "TemperatureMixture":
        """`0.7`, or `0.0:0.3,0.7:0.7` (temperature:share); shares must add up to 1."""
        try:
            pairs = [part.split(":") for part in text.split(",")]
            if len(pairs) == 1 and len(pairs[0]) == 1:
                pairs = [[pairs[0][0], "1"]]
            temperatures, shares = zip(*((float(t), float(share)) for t, share in pairs), strict=True)
        except ValueError:
            raise UserError(
                f"--temperature {text!r}: not a temperature and not a mixture. Write 0.7 or 0.0:0.3,0.7:0.7."
            ) from None
        if not all(0 <= number < math.inf for number in (*temperatures, *shares)) or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"--temperature {text!r}: the shares add up to {sum(shares):g}. They must add up to 1, and every "
                "number must be finite and not negative."
            )
        return cls(temperatures, shares)

    def draw(self, seed: int, row_id: str) -> float:
        """The temperature of one row."""
        place = fraction("temperature", seed, row_id)
        for temperature, share in zip(self.temperatures, self.shares, strict=True):
            place -= share
            if place < 0:
                return temperature
        return self.temperatures[-1]


@dataclass(frozen=True)
class ExtraSampling:
    """Sampling beyond temperature and top_p, in the order transformers applies it. None: left to the engine, which in
    this process means off."""

    repetition_penalty: float | None = None
    top_k: int | None = None  # 0: all tokens
    min_p: float | None = None

    def given(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class GenerationConfig(msgspec.Struct, omit_defaults=True):
    """What a target's generation_config.json says of sampling."""

    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    no_repeat_ngram_size: int | None = None

    def asked(self) -> dict[str, float]:
        """Every setting that changes what is sampled."""
        neutral = {"repetition_penalty": 1, "min_p": 0, "top_p": 1, "typical_p": 1, "no_repeat_ngram_size": 0}
        asked = {**msgspec.to_builtins(self), **({"top_k": max(self.top_k, 0)} if self.top_k is not None else {})}
        return {name: value for name, value in asked.items() if value is not None and value != neutral.get(name)}


def read_generation_config(name: str) -> dict[str, float] | None:
    """What the generation_config of a folder, or of a hub model in this machine's cache, asks for; None where there is
    none to read. Nothing is downloaded: a server's model may bear any name."""
    path = Path(name) / "generation_config.json"
    if not path.is_file():
        cached = _in_hub_cache(name)
        if cached is None:
            return None
        path = cached
    return read_json(path, GenerationConfig, hint="It belongs to the target; download it again.").asked()


def resolve_extra(flags: ExtraSampling, asked: Mapping[str, float]) -> ExtraSampling:
    """The flags, and what generation_config asks for where no flag is given."""
    return ExtraSampling(**{**{name: asked.get(name) for name in asdict(flags)}, **flags.given()})  # type: ignore[arg-type]


def describe(extra: ExtraSampling, asked: Mapping[str, float] | None, *, temperature: str, top_p: float) -> list[str]:
    """Sentences for the log: how answers are sampled, and where that differs from what the target asks for."""
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, **extra.given()}
    told = [f"sampling: {', '.join(f'{name} {value}' for name, value in settings.items())}"]
    if asked is None:
        told.append(
            "the target's generation_config is not on this machine: a server applies its own top_k, min_p and "
            "repetition_penalty where --top-k, --min-p and --repetition-penalty are not given"
        )
    differs = [f"{name} {value}" for name, value in (asked or {}).items() if str(settings.get(name)) != str(value)]
    if differs:
        told.append(f"the target's generation_config asks for {', '.join(differs)}, which is not used here")
    return told


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "generation_config.json")
    except HFValidationError:  # not a name the hub knows: a path on the server's machine, say
        return None
    return Path(found) if isinstance(found, str) else None
