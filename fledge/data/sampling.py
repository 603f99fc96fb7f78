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
from fledge.offline import stop_asking_an_unknown_hub
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
        if not all(0 <= number < math.inf for number in (*temperatures, *shares)):
            raise UserError(f"--temperature {text!r}: every number must be finite and not negative.")
        if abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"--temperature {text!r}: the shares add up to {sum(shares):g}. They must add up to 1.")
        return cls(temperatures, shares)

    def draw(self, seed: int, row_id: str) -> float:
        """The temperature of one row."""
        place = fraction("temperature", seed, row_id)
        for temperature, share in zip(self.temperatures, self.shares, strict=True):
            place -= share
            if place < 0:
                return temperature
        return self.temperatures[-1]


Listed = str | list[Any] | dict[str, Any] | None
NEUTRAL: dict[str, float] = {
    "repetition_penalty": 1, "min_p": 0, "top_p": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1,
    "num_beams": 1, "penalty_alpha": 0, "min_length": 0, "min_new_tokens": 0,
}  # fmt: skip
EMPTY: tuple[Any, ...] = ("", [], {})


@dataclass(frozen=True)
class ExtraSampling:
    """Sampling beyond temperature and top_p, in the order transformers applies it, and where answers stop. None: left
    to the engine, which in this process means off."""

    repetition_penalty: float | None = None
    top_k: int | None = None  # 0: all tokens
    min_p: float | None = None
    stop: tuple[str, ...] | None = None  # strings that end an answer

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class GenerationConfig(msgspec.Struct, omit_defaults=True):
    """What a target's generation_config.json says of sampling: what fledge applies, then what it only knows by name."""

    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_strings: str | list[str] | None = None

    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_h: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_repetition_penalty: float | None = None
    encoder_no_repeat_ngram_size: int | None = None
    guidance_scale: float | None = None
    num_beams: int | None = None
    penalty_alpha: float | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    suppress_tokens: Listed = None
    begin_suppress_tokens: Listed = None
    bad_words_ids: Listed = None
    sequence_bias: Listed = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: Listed = None
    watermarking_config: Listed = None

    def asked(self) -> dict[str, Any]:
        """Every setting that changes what is sampled; `stop` are the stop strings."""
        asked = msgspec.to_builtins(self)
        if self.top_k is not None:
            asked["top_k"] = max(self.top_k, 0)
        if stop := asked.pop("stop_strings", None):
            asked["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return {
            name: value for name, value in asked.items()
            if value is not None and value != NEUTRAL.get(name) and value not in EMPTY
        }  # fmt: skip


def read_generation_config(name: str, *, download: bool = False) -> dict[str, Any] | None:
    """What the generation_config of a folder, or of a hub model in this machine's cache, asks for; None where there is
    none to read. `download` fetches a hub model's; else nothing is: a server's model may bear any name."""
    path = Path(name) / "generation_config.json"
    if not path.is_file():
        cached = None if Path(name).is_dir() else _from_hub(name, download)
        if cached is None:
            return None
        path = cached
    return read_json(path, GenerationConfig, hint="It belongs to the target; download it again.").asked()


def resolve_extra(flags: ExtraSampling, asked: Mapping[str, Any]) -> ExtraSampling:
    """The flags, and what generation_config asks for where no flag is given."""
    chosen: dict[str, Any] = {**{name: asked.get(name) for name in asdict(flags)}, **flags.given()}
    return ExtraSampling(**chosen)


def describe(extra: ExtraSampling, asked: Mapping[str, Any] | None, *, temperature: str, top_p: float) -> list[str]:
    """Sentences for the log: how answers are sampled, and where that differs from what the target asks for."""
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, **extra.given()}
    told = [f"sampling: {', '.join(f'{name} {shown(value)}' for name, value in settings.items())}"]
    if asked is None:
        told.append(
            "the target's generation_config is not on this machine: a server applies its own top_k, min_p and "
            "repetition_penalty where --top-k, --min-p and --repetition-penalty are not given"
        )
    differs = [
        f"{name} {shown(value)}" for name, value in (asked or {}).items() if str(settings.get(name)) != str(value)
    ]
    if differs:
        told.append(f"the target's generation_config asks for {', '.join(differs)}, which is not used here")
    return told


def shown(value: Any) -> str:
    """A setting in a sentence."""
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _from_hub(name: str, download: bool) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "generation_config.json")
        if found is None and download:
            stop_asking_an_unknown_hub()
            found = hf_hub_download(name, "generation_config.json")
    except HFValidationError:  # not a name the hub knows: a path on the server's machine, say
        return None
    except OSError:  # no such file or no network; what loads the target says more
        return None
    return Path(found) if isinstance(found, str) else None
