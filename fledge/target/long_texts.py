"""Reading a long text in parts, each behind the cached keys and values of those before it.

One pass over 32k tokens needs the activations of all rows at once and, in models with sliding windows or an attention
of their own, matrices of all rows by all keys. In parts it needs them for one part, and a cache of the whole text.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fledge.errors import UserError
from fledge.target.model import Target, longrope_limit
from fledge.target.record import TargetOutput

SHORT, PART = 24, 10  # tokens of the comparison before the first long text, and of its parts
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.08}  # relative, as in decoding's self-test

_compared: "weakref.WeakSet[Target]" = weakref.WeakSet()


def read_text(target: Target, input_ids: Tensor, part: int) -> TargetOutput:
    """Hidden states (1, T, ..) of a text (T,) in parts of so many tokens; 0: at once."""
    if not part or len(input_ids) <= part:
        return target.forward(input_ids[None])
    _refuse_other_states(target, len(input_ids))
    return _in_parts(target, input_ids, part)


def _in_parts(target: Target, input_ids: Tensor, part: int) -> TargetOutput:
    cache: Any = DynamicCache(config=target.text_config)
    positions = torch.arange(len(input_ids), device=input_ids.device)
    outputs = [
        target.forward(ids[None], position_ids=where[None], past_key_values=cache)
        for ids, where in zip(input_ids.split(part), positions.split(part), strict=True)
    ]
    taps = [output.tap_hidden for output in outputs if output.tap_hidden is not None]
    return TargetOutput(torch.cat([output.last_hidden for output in outputs], 1), torch.cat(taps, 1) if taps else None)


def _refuse_other_states(target: Target, length: int) -> None:
    """Some models compute other states when a text comes in parts; what they compute at once is what counts."""
    limit = longrope_limit(getattr(target.text_config, "rope_parameters", None))
    if limit is not None and length > limit:
        raise UserError(
            f"{target.name}: past {limit} tokens its rope is another one for the whole text, which cannot be read in "
            f"parts. Leave --prefill-chunk out, or give --model-max-length {limit}."
        )
    if target in _compared:
        return
    first = target.vocab_size // 2
    ids = torch.arange(first, first + SHORT, device=target.device) % target.vocab_size
    try:
        found, expected = _in_parts(target, ids, PART).last_hidden, target.forward(ids[None]).last_hidden
        error = ((found - expected).float().norm() / expected.float().norm()).item()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as crash:
        raise _not_in_parts(target, f"{type(crash).__name__}: {(str(crash).splitlines() or [''])[0][:120]}") from crash
    if not error <= TOLERANCE.get(target.dtype, TOLERANCE[torch.bfloat16]):
        raise _not_in_parts(target, f"its states of {SHORT} tokens differ by {error:.0%}")
    _compared.add(target)


def _not_in_parts(target: Target, reason: str) -> UserError:
    return UserError(
        f"{target.name}: a text cannot be read in parts by this target ({reason}). Leave --prefill-chunk out, or let a "
        f"vLLM server read it (--target_backend vllm)."
    )
