"""What transformers does not answer uniformly about a target, as rows of a table.

The logits of most models are `lm_head(last_hidden)`. Some scale or soft-cap them afterwards; the draft's teacher and
the decoder must do the same. `Target` compares the reconstruction with the model's own logits when it is loaded, so a
missing row is found before anything is trained on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitQuirks:
    """logits = soft_cap * tanh(scale * head(last_hidden) / soft_cap)"""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Raw head outputs (..., V) to the model's logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


def _soft_cap(config: Any) -> LogitQuirks:
    names = ("final_logit_softcapping", "logits_soft_cap")
    return LogitQuirks(soft_cap=next((value for name in names if (value := getattr(config, name, None))), None))


def _multiplied(config: Any) -> LogitQuirks:
    return LogitQuirks(scale=config.logit_scale)


def _divided(config: Any) -> LogitQuirks:
    return LogitQuirks(scale=1.0 / config.logits_scaling)


# model_type of the text config -> quirks
LOGIT_QUIRKS: dict[str, Callable[[Any], LogitQuirks]] = {
    "gemma2": _soft_cap, "gemma3": _soft_cap, "gemma3_text": _soft_cap, "gemma3n_text": _soft_cap,
    "gemma4_text": _soft_cap, "gemma4_unified_text": _soft_cap, "vaultgemma": _soft_cap, "nanochat": _soft_cap,
    "recurrent_gemma": _soft_cap,
    "cohere": _multiplied, "cohere2": _multiplied, "cohere2_moe": _multiplied,
    "granite": _divided, "granitemoe": _divided, "granitemoeshared": _divided, "granitemoehybrid": _divided,
    "granite_swa": _divided, "granitemoe_swa": _divided, "minicpm3": _divided,
    "hyperclovax": lambda config: LogitQuirks(scale=config.logits_scaling),
    "falcon_h1": lambda config: LogitQuirks(scale=config.lm_head_multiplier),
}  # fmt: skip


def longest_text(text_config: Any) -> int | None:
    """Tokens that the model's positions hold, prompt and answer together; None where nothing limits them."""
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    if text_config.model_type == "moshi":  # its cache forgets what is behind the window, its mask does not
        limits.append(text_config.sliding_window)
    return min((limit for limit in limits if limit), default=None)


def logit_quirks(text_config: Any) -> LogitQuirks:
    """The row of this target; plain `lm_head(last_hidden)` where there is none."""
    row = LOGIT_QUIRKS.get(text_config.model_type)
    return row(text_config) if row else LogitQuirks()
