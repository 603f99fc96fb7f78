"""What a caller asks of an answer, as keyword arguments or as a transformers GenerationConfig.

A GenerationConfig means here what it means to `model.generate`: fields that are not set are the model's own, then
transformers' defaults; sampling needs `do_sample`. Keyword arguments alone mean what the flags of `fledge decode` do:
the model's own repetition_penalty, top_k, min_p and stop strings hold where they are not given. A field that would
change the answer in a way that is not built here is refused by its name, never passed over.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from fledge.decoding.records import Sampling
from fledge.errors import UserError, nearest

DEFAULT_LENGTH = 256  # new tokens, where nothing says how many
SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
ONLY_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
FROM_OWN = ("repetition_penalty", "top_k", "min_p", "stop_strings")  # the model's, beside keyword arguments alone
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers', where do_sample is set
LENGTHS = ("max_new_tokens", "max_length")
TAKEN = (*SAMPLING, *LENGTHS, "eos_token_id", "stop_strings")
# What does not change the text of an answer that is drawn from the model's own distribution, token by token.
WITHOUT_EFFECT = {
    "assistant_confidence_threshold", "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation",
    "compile_config", "continuous_batching_config", "decoder_start_token_id", "disable_compile", "diversity_penalty",
    "early_stopping", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "pad_token_id", "prefill_chunk_size",
    "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "target_lookbehind",
    "transformers_version", "use_cache",
}  # fmt: skip
# Values beside None, False, 0 and empty ones that ask for nothing.
NEUTRAL = {
    "encoder_repetition_penalty": 1, "guidance_scale": 1, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "repetition_penalty": 1, "typical_p": 1,
}  # fmt: skip


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `Speculator.generate`, `stream` and `generate_batch`."""

    max_new_tokens: int | None
    temperature: float | None  # 0, the default, takes the most likely token
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None  # strings that end an answer; its text ends before them
    seed: int | None
    eos_token_id: int | list[int] | None  # instead of the target's own


@dataclass(frozen=True)
class GenerationSettings:
    """What was asked for."""

    sampling: Sampling
    eos_token_ids: tuple[int, ...] | None  # None: the target's own
    max_new_tokens: int | None = None
    max_length: int | None = None  # prompt included

    def limit(self, prompt_length: int) -> int:
        """New tokens at most behind a prompt of this length."""
        if self.max_new_tokens is not None or self.max_length is None:
            return DEFAULT_LENGTH if self.max_new_tokens is None else self.max_new_tokens
        if self.max_length <= prompt_length:
            raise UserError(
                f"max_length={self.max_length} counts the prompt, which has {prompt_length} tokens. Set max_new_tokens."
            )
        return self.max_length - prompt_length


def read_settings(config: Any, own: Any, options: GenerationOptions) -> GenerationSettings:
    """Settings from a GenerationConfig or None, the model's own one, and keyword arguments, which come first."""
    known = GenerationOptions.__annotations__.keys() | set(SAMPLING)
    if unknown := next((name for name in options if name not in known), None):
        raise UserError(
            f"{unknown} is no setting of a generation{nearest(unknown, known)}. There are: {sorted(known)}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    drawn = (options.get("temperature") or 0) > 0
    fields = _own_fields(own, drawn=drawn) if config is None else _fields(config, own)
    lengths = {name: fields.pop(name, None) for name in LENGTHS}
    if "max_new_tokens" in given:
        lengths = {"max_new_tokens": given.pop("max_new_tokens")}
    eos: Any = given.pop("eos_token_id", fields.pop("eos_token_id", None))
    ids = eos if eos is None or isinstance(eos, (list, tuple)) else [eos]
    stop: Any = given.pop("stop", fields.pop("stop_strings", ()))
    sampling = Sampling(**{**fields, **given}, stop=(stop,) if isinstance(stop, str) else tuple(stop))
    return GenerationSettings(sampling, None if ids is None else tuple(ids), **lengths)


def _fields(config: Any, own: Any) -> dict[str, Any]:
    """What a GenerationConfig sets of our fields; other fields that it sets are refused."""
    merged = copy.deepcopy(config)
    if own is not None:
        merged.update(**own.to_dict(), defaults_only=True)
    refuse_fields(merged)
    values = {name: value for name, value in vars(merged).items() if value is not None and name in TAKEN}
    if merged.do_sample:
        return DEFAULTS | values
    return {name: value for name, value in values.items() if name not in ONLY_SAMPLED}


def _own_fields(own: Any, *, drawn: bool) -> dict[str, Any]:
    """What the model's own GenerationConfig sets, of the fields that need no `do_sample` of its own."""
    if own is None:
        return {}
    refuse_fields(own, drawn=drawn)
    values = {name: getattr(own, name, None) for name in FROM_OWN if drawn or name not in ONLY_SAMPLED}
    return {name: value for name, value in values.items() if value is not None}


def refuse_fields(config: Any, *, but: str = "", drawn: bool | None = None) -> None:
    """An error that names the fields of a GenerationConfig that would change the answer; `but` is dealt with. `drawn`:
    whether tokens are drawn, where the config's do_sample does not say it."""
    drawn = config.do_sample if drawn is None else drawn
    passed = {*WITHOUT_EFFECT, *TAKEN, "do_sample", but, *(() if drawn else ONLY_SAMPLED)}
    fields = {name: getattr(config, name, None) for name in sorted(vars(type(config)()).keys() - passed)}
    lost = [f"{name}={value!r}" for name, value in fields.items() if name[0] != "_" and not _is_neutral(name, value)]
    if lost:
        raise UserError(
            f"the generation config sets {', '.join(lost)}, which speculative decoding does not support here. Set it "
            f"to None, or generate with the model alone."
        )


def _is_neutral(name: str, value: Any) -> bool:
    return not value or value == NEUTRAL.get(name)
