"""What a call asks for, checked before anything runs: the prompt, the limit, the head that fits, stops and draws.

Both engines use it, so both refuse the same things in the same words.
"""

from collections.abc import Sequence

import torch

from fledge.decoding.records import Sampling
from fledge.draft.model import DraftModel
from fledge.errors import UserError
from fledge.target.model import Target


class PromptTooLong(UserError):
    """A prompt that leaves the target no position for an answer."""


def emission_limit(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    """Tokens that may be emitted: what was asked for, at most what the target's positions hold."""
    if not len(prompt_ids):
        raise UserError("the prompt has no tokens. Give at least one, such as the beginning-of-sequence token.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    rows = target.embedding_weight.shape[0]
    if bad := next((token for token in prompt_ids if not 0 <= token < rows), None):
        raise UserError(f"the prompt holds token id {bad}, but {target.name} has ids 0..{rows - 1}. Use its tokenizer.")
    longest = getattr(target.text_config, "max_position_embeddings", None)
    if longest is None:
        return max_new_tokens
    if len(prompt_ids) >= longest:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids)} tokens, but {target.name} has {longest} positions "
            f"(max_position_embeddings). Shorten the prompt."
        )
    return min(max_new_tokens, longest - len(prompt_ids))


def check_pair(target: Target, draft: DraftModel) -> None:
    """Refuse a head that learned from other layers: it would decode, at an acceptance near zero."""
    if tuple(draft.config.tap_layers) != target.tap_layers:
        raise UserError(
            f"the head was trained on tap layers {list(draft.config.tap_layers)}, the target taps "
            f"{list(target.tap_layers)}. Load the target with the head's tap layers."
        )


def stop_ids(target: Target, given: Sequence[int] | None) -> frozenset[int]:
    """The ids that end a generation."""
    return frozenset(target.eos_token_ids if given is None else given)


def seeded_generator(target: Target, sampling: Sampling) -> torch.Generator | None:
    """The source of the draws, on the target's device; None for greedy decoding."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device=target.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
