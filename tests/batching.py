"""Batches of tiny targets with scripted and untrained drafters, for the tests of batches and of captured rounds."""

import functools

from tiny import ScriptedDraft, prompt, tiny_draft, tiny_target

from fledge.decoding.generate import generate, generate_batch, open_session
from fledge.decoding.records import Generation, Sampling
from fledge.decoding.requests import Request
from fledge.decoding.session import Session
from fledge.drafters.tree import TreeShape

GREEDY = Sampling()
NEW, TREE = 10, TreeShape()
RAGGED = (20, 1, 5)  # lengths of prompts
CASES = (  # drafter, tree, prompts
    ("random", TreeShape(60, 7, 10), RAGGED),
    ("zero", TreeShape(6, 4, 1), (5, 5)),
    ("adversarial", TreeShape(8, 0, 10), (1,)),
    ("every third token wrong", TreeShape(32, 4, 4), RAGGED),
    ("every third token wrong", TreeShape(60, 5, 10), (20,)),
    ("random", TreeShape(1, 5, 10), (5, 1)),
    (None, TreeShape(), RAGGED),
)
POLICIES = ("exact", "fixed")
PENALTY = Sampling(repetition_penalty=1.6)


@functools.cache
def plain(name: str, length: int, new: int = NEW) -> list[int]:
    return generate(
        tiny_target(name), None, prompt(length), max_new_tokens=new, eos_token_ids=(), shapes="exact"
    ).token_ids  # fmt: skip


def script(name: str, length: int, new: int = NEW) -> list[int]:
    return prompt(length) + plain(name, length, new)


def drafter_of(kind: str | None, name: str, lengths: tuple[int, ...]):
    if kind == "every third token wrong":
        return ScriptedDraft(tiny_target(name), *(script(name, length) for length in lengths), wrong=3)
    return None if kind is None else tiny_draft(tiny_target(name), kind)


def batch(name: str, drafter, lengths: tuple[int, ...], tree: TreeShape = TREE, **changes) -> list[Generation]:
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "eos_token_ids": (), "shapes": "fixed", **changes}
    target = options.pop("target", None) or tiny_target(name)
    return generate_batch(target, drafter, [prompt(length) for length in lengths], tree=tree, **options)


def opened(name: str, drafter, lengths: tuple[int, ...], **changes) -> Session:
    """A session of fixed shapes with these prompts waiting."""
    options = {"tree": TreeShape(20, 3, 4), "shapes": "fixed", "eos_token_ids": (3,), **changes}
    sampling = options.pop("sampling", GREEDY)
    requests = [Request(prompt(length), NEW, sampling) for length in lengths]
    found = open_session(tiny_target(name), drafter, requests, **options)
    for request in requests:
        found.add(request)
    return found


def answers(found: Session) -> list[list[int]]:
    states = list(found.waiting)
    found.run()
    return [state.token_ids for state in states]
