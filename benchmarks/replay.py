"""What decoding with a drafter would accept in answers that are known, without a forward of the target.

The engine's text is the target's own at every temperature: its draws belong to places of the text, not to drafts. So
the rounds of a decode follow from the text: the drafter follows what was emitted and proposes a tree, and as much of it
is accepted as says what comes next. A test compares with decoding (tests/benchmarks/test_study.py).
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge import provenance
from fledge.data.tokenize import Sample
from fledge.decoding.generate import generate_batch
from fledge.decoding.records import Sampling
from fledge.drafters.base import Drafter, Emitted
from fledge.drafters.registry import proposer_of
from fledge.drafters.tree import Trees, TreeShape
from fledge.target.live import LiveSource
from fledge.target.model import Target

AT_ONCE = 16  # answers that are replayed together
PLAIN = TreeShape(1, 0, 1)

# L tokens of prompt and answer, A tapped layers, H hidden size, B answers at once, E new tokens of a round


@dataclass(frozen=True)
class Answer:
    """A prompt and the target's answer to it, with what a drafter may see of the target."""

    ids: Tensor  # (L,)
    prompt_length: int
    taps: Tensor  # (L, A, H)
    entropies: Tensor  # (L,) in nats, of the law at temperature 1 that token j was drawn from; 0 within the prompt

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Round:
    """One forward of the target."""

    place: int  # of the token behind the root, in the text
    accepted: int  # drafts
    room: int  # tokens that were left


@torch.inference_mode()
def recorded(
    target: Target, prompts: Sequence[Sequence[int]], *, stops: Sequence[int], most: int, temperature: float, kept: Path
) -> list[Answer]:  # fmt: skip
    """The target's answers, of up to `most` tokens; their ids are kept in a file. Answers of one token have no rounds
    and are left out."""
    if not kept.is_file():
        made = generate_batch(target, None, prompts, tree=PLAIN, max_new_tokens=most, eos_token_ids=tuple(stops),
                              sampling=Sampling(temperature, seed=0), batch_size=16)  # fmt: skip
        provenance.write_json(kept, [one.token_ids for one in made])
    answers = []
    for index, (prompt, answer) in enumerate(zip(prompts, json.loads(kept.read_text(encoding="utf-8")), strict=True)):
        if len(answer) < 2:
            continue
        ids = torch.tensor([*prompt, *answer])
        record = LiveSource(target).record(Sample(str(index), ids, torch.arange(len(ids)) >= len(prompt)))
        log_probs = target.head(record.last_hidden[len(prompt) - 1 : -1]).float().log_softmax(-1)
        entropies = torch.zeros(len(ids))
        entropies[len(prompt) :] = -(log_probs.exp() * log_probs).sum(-1)
        answers.append(Answer(ids, len(prompt), record.tap_hidden, entropies))
    return answers


def columns(answers: Sequence[Answer], tapped: Sequence[int], wanted: Sequence[int] | None) -> list[Answer]:
    """The answers with the taps that a drafter reads."""
    places = [list(tapped).index(layer) for layer in wanted or ()]
    return [dataclasses.replace(one, taps=one.taps[:, places]) for one in answers]


@torch.inference_mode()
def replay(drafter: Drafter, shape: TreeShape, answers: Sequence[Answer], at_once: int = AT_ONCE) -> list[list[Round]]:
    """The rounds of every answer."""
    found: list[list[Round]] = [[] for _ in answers]
    order = sorted(range(len(answers)), key=lambda index: answers[index].tokens)
    for first in range(0, len(order), at_once):
        group = order[first : first + at_once]
        for index, rounds in zip(group, _together(drafter, shape, [answers[index] for index in group]), strict=True):
            found[index] = rounds
    return found


def _together(drafter: Drafter, shape: TreeShape, answers: Sequence[Answer]) -> list[list[Round]]:
    longest = max(len(answer.ids) for answer in answers)
    proposer: Any = proposer_of(drafter, shape, len(answers), 0)
    proposer.reserve(longest + proposer.rows_ahead + 1)
    for slot, one in enumerate(answers):
        length = one.prompt_length
        proposer.fill(slot, one.ids[:length], one.taps[:length], torch.arange(length))
    lengths = [answer.prompt_length for answer in answers]  # committed; the root stands behind them
    num_new = [1] * len(answers)
    rounds: list[list[Round]] = [[] for _ in answers]
    while room := max(len(one.ids) - 1 - length for one, length in zip(answers, lengths, strict=True)):
        num_levels = min(proposer.num_levels, room - 1)
        trees = None
        if num_levels:  # else the last token of all, which nothing is drafted for
            num_keys = max(lengths) + proposer.rows_ahead
            emitted = _emitted(answers, lengths, num_new, 1 + proposer.num_levels)
            proposer.follow(emitted, num_keys)
            trees = proposer.propose(emitted, num_levels, num_keys)
        for slot, answer in enumerate(answers):
            place = lengths[slot] + 1
            if (left := len(answer.ids) - place) == 0:
                continue  # it has ended, and is computed on
            accepted = _walked(trees, slot, answer.ids[place:].tolist()) if trees is not None else 0
            rounds[slot].append(Round(place, accepted, left))
            num_new[slot] = min(accepted + 1, left)
            lengths[slot] += num_new[slot]
    return rounds


def _emitted(answers: Sequence[Answer], lengths: Sequence[int], num_new: Sequence[int], slots: int) -> Emitted:
    """The last `num_new` tokens of each, the root among them, filled up to E slots."""
    tokens = torch.zeros(len(answers), slots, dtype=torch.int64)
    taps = answers[0].taps.new_zeros(len(answers), slots, *answers[0].taps.shape[1:])
    for row, (answer, length, new) in enumerate(zip(answers, lengths, num_new, strict=True)):
        tokens[row, :new] = answer.ids[length - new + 1 : length + 1]
        taps[row, :new] = answer.taps[length - new : length]
    return Emitted(tokens, torch.tensor(num_new), taps, torch.tensor(lengths))


def _walked(trees: Trees, slot: int, text: Sequence[int]) -> int:
    """How many tokens of the text lie on a path from the root."""
    tokens, parents = trees.token_ids[slot].tolist(), trees.parents[slot].tolist()
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)) if node}
    node = accepted = 0
    for token in text:
        if (child := children.get((node, token))) is None:
            break
        node, accepted = child, accepted + 1
    return accepted


def tau(rounds: Sequence[Sequence[Round]]) -> float:
    """Tokens per forward of the target, the prompt's forward and the token it gives left out."""
    emitted = sum(min(one.accepted + 1, one.room) for answer in rounds for one in answer)
    return emitted / max(sum(map(len, rounds)), 1)
