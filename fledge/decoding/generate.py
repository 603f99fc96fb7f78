"""Decoding as functions: one prompt, several, or a stream of rounds. With a drafter and without, the same engine.

Sessions (`session.py`) are kept for the next call: their caches, and on a GPU their captured rounds. `shapes` says how
rounds are computed: `exact` shapes follow the sequences, `fixed` ones are captured into CUDA graphs on a GPU; `auto` is
fixed on a GPU wherever that is possible.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from fledge.decoding.adaptive import TreeChoice, decides_rounds
from fledge.decoding.exact import is_exact
from fledge.decoding.memory import check_memory
from fledge.decoding.probe import ability_of, shape_for
from fledge.decoding.records import Generation, RoundTrace, Sampling
from fledge.decoding.requests import OnTokens, Request, RequestState, check_request
from fledge.decoding.session import Session, in_buckets, rows_ahead
from fledge.drafters.base import Drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

__all__ = ["Generation", "RoundTrace", "Sampling", "TreeShape", "generate", "generate_batch", "stream"]

ShapePolicy = Literal["auto", "exact", "fixed"]
OnRowTokens = Callable[[int, list[int]], None]
KEPT_SESSIONS = 2  # per target: plain and speculative, say

_sessions: "weakref.WeakKeyDictionary[Target, OrderedDict[tuple, Session]]" = weakref.WeakKeyDictionary()


def generate(
    target: Target,
    drafter: Drafter | None,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    tree: TreeShape | None = None,
    sampling: Sampling | None = None,
    eos_token_ids: Sequence[int] | None = None,
    trace: bool = False,
    on_tokens: OnTokens | None = None,
    model_inputs: Mapping[str, Tensor] | None = None,
    budget: Any = None,
    shapes: ShapePolicy = "auto",
) -> Generation:
    """The answer to one prompt; plain decoding where `drafter` is None.

    `on_tokens` is called with every round's tokens as they appear. `model_inputs` is what the target takes beside the
    prompt's ids: the pixels of its pictures and their like. With a `budget` (`adaptive.py`), `tree` is the most that is
    drafted.
    """
    request = Request(
        prompt_ids, max_new_tokens, sampling or Sampling(), on_tokens, model_inputs=model_inputs or {}, trace=trace
    )
    session = open_session(
        target, drafter, [request], tree=tree, eos_token_ids=eos_token_ids, budget=budget, shapes=shapes
    )
    state = session.add(request)
    session.run()
    return state.generation()


def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tree: TreeShape | None = None,
    sampling: Sampling | None = None,
    eos_token_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    on_tokens: OnRowTokens | None = None,
    budget: Any = None,
    model_inputs: Sequence[Mapping[str, Tensor]] = (),
    shapes: ShapePolicy = "auto",
) -> list[Generation]:
    """The answers to all prompts, in their order, `batch_size` at a time (None: all); a finished one makes room for the
    next. `on_tokens(prompt's index, new tokens)` as they appear. With a seed, prompt i draws as it does alone with the
    seed plus i. `model_inputs` are those of every prompt, where there are pictures."""
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    if not prompts:
        return []

    def told(index: int) -> OnTokens | None:
        return None if on_tokens is None else lambda new: on_tokens(index, new)

    laws = seeded(sampling or Sampling(), len(prompts))
    requests = [
        Request(prompt, max_new_tokens, law, told(index), inputs)
        for index, (prompt, law, inputs) in enumerate(
            zip(prompts, laws, model_inputs or [{}] * len(prompts), strict=True)
        )
    ]
    session = open_session(
        target, drafter, requests, tree=tree, eos_token_ids=eos_token_ids, batch_size=batch_size, budget=budget,
        shapes=shapes,
    )  # fmt: skip
    states = [session.add(request) for request in requests]
    session.run()
    return [state.generation() for state in states]


def stream(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tree: TreeShape | None = None,
    sampling: Sampling | None = None,
    eos_token_ids: Sequence[int] | None = None,
    model_inputs: Mapping[str, Tensor] | None = None,
    budget: Any = None,
    shapes: ShapePolicy = "auto",
) -> Generator[list[list[int]], None, None]:
    """Per round, the new tokens of every prompt; an empty list for those without. Closing the iterator cancels.

    `model_inputs` belong to the prompt where there is one.
    """
    assert not model_inputs or len(prompts) == 1, "pictures are of one prompt"
    laws = seeded(sampling or Sampling(), len(prompts))
    requests = [
        Request(prompt, max_new_tokens, law, model_inputs=model_inputs or {})
        for prompt, law in zip(prompts, laws, strict=True)
    ]
    session = open_session(
        target, drafter, requests, tree=tree, eos_token_ids=eos_token_ids, budget=budget, shapes=shapes
    )
    states: list[RequestState] = [session.add(request) for request in requests]
    try:
        while not session.idle:
            new = {id(state): tokens for state, tokens in session.step()}
            if new:
                yield [new.get(id(state), []) for state in states]
    finally:
        for state in states:
            session.cancel(state)


def seeded(sampling: Sampling, number: int) -> list[Sampling]:
    """The sampling of every prompt of a batch: prompt i draws as `generate` does with the seed plus i."""
    seed = sampling.seed
    return [sampling if seed is None else replace(sampling, seed=seed + index) for index in range(number)]


def open_session(
    target: Target,
    drafter: Drafter | None,
    requests: Sequence[Request],
    *,
    tree: TreeShape | None = None,
    eos_token_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    budget: Any = None,
    shapes: ShapePolicy = "auto",
) -> Session:
    """A session for such requests: a kept one that is idle and large enough, else a new one."""
    if not requests:
        raise UserError("there are no prompts to answer. Give at least one.")
    if drafter is not None:
        check_pair(target, drafter)
    tree, choice = tree or TreeShape(), None
    if drafter is not None and isinstance(budget, TreeChoice):
        choice, budget, tree = budget, None, budget.next_tree()
        drafter, tree = (None, TreeShape()) if tree is None else (drafter, tree)
    if drafter is not None:
        possible = shape_for(target, tree)
        drafter, tree = (None, tree) if possible is None else (drafter, possible)
    fixed = uses_fixed_shapes(
        shapes, target, drafter, pictures=any(request.model_inputs for request in requests),
        adaptive=decides_rounds(budget), trace=any(request.trace for request in requests),
    )  # fmt: skip
    batch = 1 if budget is not None else most_at_once(target, min(batch_size or len(requests), len(requests)))
    stops = frozenset(target.eos_token_ids if eos_token_ids is None else eos_token_ids)
    needed = max(len(request.prompt_ids) + check_request(target, request) for request in requests)
    most_rows = in_buckets(needed) + in_buckets(rows_ahead(tree))
    num_rows = most_rows if fixed else 0
    law = requests[0].sampling.law if fixed else Sampling()
    kept = _sessions.setdefault(target, OrderedDict())
    by_cost = drafter is not None and decides_rounds(budget)
    key = (id(drafter), tree if drafter is not None else None, batch, stops, fixed, by_cost, law, is_exact(target))
    session = kept.pop(key, None)
    if session is None or not session.idle or session.capacity < num_rows:
        session = None  # free its caches first
        while len(kept) >= KEPT_SESSIONS:
            kept.popitem(last=False)
        check_memory(target, batch, most_rows)  # of exact shapes, too, which take it as the texts grow
        session = Session(target, drafter, tree, batch, num_rows, fixed, by_cost, stops, law)
    session.budget, session.choice = budget, choice
    session.prepare(max(len(request.prompt_ids) for request in requests), needed)
    kept[key] = session
    return session


def serving_session(target: Target, *, batch_size: int, eos_token_ids: Sequence[int]) -> Session:
    """Plain decoding of requests that are not known yet, in exact shapes. The session is the caller's alone."""
    return Session(
        target, None, TreeShape(), most_at_once(target, batch_size), 0, stop_token_ids=frozenset(eos_token_ids)
    )


def most_at_once(target: Target, batch_size: int) -> int:
    """Sequences of a batch: one where the target's rope changes with the longest of them."""
    return batch_size if ability_of(target).rope_limit is None else 1


def drop_sessions(target: Target) -> None:
    """Free what is kept for the next call with this target: its sessions know it, so it would never be freed itself."""
    _sessions.pop(target, None)


def uses_fixed_shapes(
    shapes: ShapePolicy, target: Target, drafter: Drafter | None, *, pictures: bool = False, adaptive: bool = False,
    trace: bool = False,
) -> bool:  # fmt: skip
    """Whether rounds will have fixed shapes; a UserError where that was asked for and cannot be."""
    if shapes == "exact" or trace or (shapes == "auto" and target.device.type != "cuda"):
        return False
    reason = obstacle(target, drafter, pictures=pictures, adaptive=adaptive)
    if reason is not None and shapes == "fixed":
        raise UserError(f"{target.name}: no fixed shapes here: {reason}. Use --shapes auto or exact.")
    return reason is None


def obstacle(
    target: Target, drafter: Drafter | None, *, pictures: bool = False, adaptive: bool = False
) -> str | None:  # fmt: skip
    """Why rounds cannot have fixed shapes; None where they can."""
    devices = {parameter.device for parameter in target.model.parameters()}
    if drafter is not None:
        devices |= drafter.devices
    ability = ability_of(target)
    reasons = {
        ability.reason: not ability.own_cache,
        "its rope changes with the longest sequence of a batch": ability.rope_limit is not None,
        f"it is spread over {len(devices)} devices": len(devices) > 1,
        "there are pictures in the prompt": pictures,
        "--adaptive decides every tree on the host": adaptive,
        "the drafter reads the tokens on the host": drafter is not None and drafter.needs_host,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_pair(target: Target, drafter: Drafter) -> None:
    """Refuse a drafter that learned from other layers: it would decode, at an acceptance near zero."""
    if drafter.tap_layers not in (None, target.tap_layers):
        raise UserError(
            f"the head was trained on tap layers {list(drafter.tap_layers or ())}, the target taps "
            f"{list(target.tap_layers)}. Load the target with the head's tap layers."
        )
