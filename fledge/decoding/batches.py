"""Several prompts at once, and which engine answers them.

`static` has fixed shapes, is captured into CUDA graphs on a GPU and takes any number of sequences; `dynamic` is the
loop of `fledge.decoding.generate`: one sequence, every kind of target. `auto` is static on a GPU wherever it can be.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from fledge.decoding.chains import keeps_running_state
from fledge.decoding.generate import generate_plain, generate_speculative
from fledge.decoding.masks import kinds_of
from fledge.decoding.records import Generation, Sampling, TreeShape
from fledge.decoding.static_engine import BatchGeneration
from fledge.draft.model import DraftModel
from fledge.errors import UserError
from fledge.target.model import Target

Engine = Literal["auto", "dynamic", "static"]
OnRowTokens = Callable[[int, list[int]], None]


def stream(
    target: Target,
    draft: DraftModel | None,
    prompts: Sequence[Sequence[int]],
    *,
    tree: TreeShape,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int] | None = None,
) -> Iterator[list[list[int]]]:
    """Per round, the new tokens of every prompt; an empty list for those that have ended. The static engine, always.

    The first item are the prefill's tokens. Without a head every round decodes one token.
    """
    choose_engine("static", target, draft)
    yield from BatchGeneration(
        target, draft, prompts, tree=tree, max_new_tokens=max_new_tokens, sampling=sampling,
        eos_token_ids=eos_token_ids,
    ).rounds()  # fmt: skip


def generate_batch(
    target: Target,
    draft: DraftModel | None,
    prompts: Sequence[Sequence[int]],
    *,
    tree: TreeShape,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int] | None = None,
    engine: Engine = "auto",
    batch_size: int | None = None,
    on_tokens: OnRowTokens | None = None,
) -> list[Generation]:
    """The answers to all prompts, in their order; `on_tokens(prompt's index, new tokens)` as they appear.

    The static engine decodes `batch_size` prompts at once (None: all), the dynamic one after another. At temperature 0
    an answer does not depend on its neighbours, but for rounding; above, the draws of a batch come from one generator.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "sampling": sampling, "eos_token_ids": eos_token_ids,
    }  # fmt: skip
    if choose_engine(engine, target, draft) == "dynamic":
        return [_alone(target, draft, prompt, tree, _told(on_tokens, index), options)
                for index, prompt in enumerate(prompts)]  # fmt: skip
    found: list[Generation] = []
    size = batch_size or max(len(prompts), 1)
    for first in range(0, len(prompts), size):
        batch = BatchGeneration(target, draft, prompts[first : first + size], tree=tree, **options)
        for new in batch.rounds():
            for row, tokens in enumerate(new):
                if tokens and on_tokens is not None:
                    on_tokens(first + row, tokens)
        found += batch.generations()
    return found


def choose_engine(
    engine: Engine, target: Target, draft: DraftModel | None, *, pictures: bool = False, adaptive: bool = False
) -> Literal["dynamic", "static"]:
    """The engine that will decode; a UserError where `static` was asked for and cannot be."""
    if engine == "dynamic" or (engine == "auto" and target.device.type != "cuda"):
        return "dynamic"
    if (reason := obstacle(target, draft, pictures=pictures, adaptive=adaptive)) is None:
        return "static"
    if engine == "static":
        raise UserError(f"{target.name}: the static engine cannot decode this: {reason}. Use --engine auto or dynamic.")
    return "dynamic"


def obstacle(target: Target, draft: DraftModel | None, *, pictures: bool = False, adaptive: bool = False) -> str | None:
    """Why the static engine cannot decode; None where it can."""
    devices = {parameter.device for parameter in target.model.parameters()}
    if draft is not None:
        devices.add(draft.fc.weight.device)
    rope = getattr(target.text_config, "rope_parameters", None) or {}
    types = {str(rope.get("rope_type")), *(str(row.get("rope_type")) for row in rope.values() if isinstance(row, dict))}
    try:
        kinds_of(target.text_config, target.name)
        running = keeps_running_state(target)
    except UserError:
        running = True
    reasons = {
        "its layers keep a running state": running,
        "its rope (longrope) changes with the longest sequence of a batch": "longrope" in types,
        f"it is spread over {len(devices)} devices": len(devices) > 1,
        "there are pictures in the prompt": pictures,
        "--adaptive decides every tree on the host": adaptive,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _told(on_tokens: OnRowTokens | None, index: int) -> Callable[[list[int]], None] | None:
    return None if on_tokens is None else lambda new: on_tokens(index, new)


def _alone(
    target: Target, draft: DraftModel | None, prompt: Sequence[int], tree: TreeShape,
    on_tokens: Callable[[list[int]], None] | None, options: dict[str, Any],
) -> Generation:  # fmt: skip
    if draft is None:
        return generate_plain(target, prompt, on_tokens=on_tokens, **options)
    return generate_speculative(target, draft, prompt, tree=tree, on_tokens=on_tokens, **options)
