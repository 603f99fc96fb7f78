"""One round for several sequences at once, in three parts: draft, verify, accept.

What a round hands to the next lies in tensors that stay where they are (`State`), and no part reads a value on the
host, so with fixed shapes the parts can be captured into CUDA graphs and replayed (`capture.py`). Two policies:

- fixed shapes: all slots, a bucket of keys, a path of as many slots as the tree has levels. A sequence that is done
  (stop token, no room) goes on being computed on the same state and emits nothing;
- exact shapes: the host knows every length, so a round computes the sequences there are, the keys there are and the
  levels that can still be emitted, and may ask a budget how much to draft.

Knows a verifier and a proposer. Knows nothing of clocks, graphs or requests.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fledge.decoding.accept import Accepted, accept, choose_all
from fledge.decoding.noise import uniforms
from fledge.decoding.records import Sampling
from fledge.decoding.verifier import Lengths, Verifier
from fledge.drafters.base import Budget, Emitted, Proposer
from fledge.drafters.tree import Trees, first_nodes, roots_only
from fledge.target.model import Target

# B sequences, N tree nodes, E slots: the most tokens of a round, A tapped layers, H hidden size, V vocabulary

Part = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class State:
    """What one round hands to the next, per sequence. Written in place."""

    lengths: Tensor  # (B,) committed rows; the root stands behind them
    tokens: Tensor  # (B, E) emitted by the last round; the first num_new count, the last of them is the root
    num_new: Tensor  # (B,)
    taps: Tensor  # (B, E, A, H) of the tokens before them; A = 0 where the proposer reads none
    room: Tensor  # (B,) tokens that may still be emitted
    done: Tensor  # (B,) bool
    seeds: Tensor  # (B,) of the draws
    seen: Tensor  # (B, V) bool, the tokens up to the root; kept where the sampling penalises repetition
    news: Tensor  # (B, 1 + E) for the host: how many tokens the last round emitted, and the tokens

    def first(self, batch: int) -> "State":
        """The first slots, as views."""
        return State(**{field.name: getattr(self, field.name)[:batch] for field in dataclasses.fields(self)})

    def set(self, **values: Tensor) -> None:
        """Overwrite the leading slots (E) of these fields."""
        for name, value in values.items():
            field = getattr(self, name)
            (field if field.dim() == 1 else field[:, : value.shape[1]]).copy_(value)

    def copy(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name).clone() for field in dataclasses.fields(self)}

    def move(self, source: int, goal: int) -> None:
        """The sequence of slot `source` goes on in slot `goal`."""
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            tensor[goal] = tensor[source]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a round computes."""

    num_keys: int  # cache rows that are read
    lengths: tuple[int, ...] | None = None  # exact shapes: the committed rows of the sequences; None: all slots
    num_slots: int | None = None  # exact shapes: the most new tokens a sequence has; None: as many as there can be
    num_levels: int | None = None  # exact shapes: levels to draft; None: all
    budget: Budget | None = None


class Round:
    """The three parts for one target and proposer, and `batch` slots."""

    def __init__(
        self, target: Target, verifier: Verifier, proposer: Proposer | None, batch: int, free: Proposer | None = None
    ) -> None:
        """`free`: drafts chains without taking time; a budget chooses between them and the proposer's trees."""
        device = target.device
        self.verifier, self.proposer, self.free, self.batch = verifier, proposer, free, batch
        self.proposers = [one for one in (proposer, free) if one is not None]
        self._head = verifier.head
        self.num_nodes = 1 + max((one.num_drafted for one in self.proposers), default=0)
        self.num_slots = 1 + max((one.num_levels for one in self.proposers), default=0)
        self.stops = torch.zeros(target.vocab_size, dtype=torch.bool, device=device)
        self.samplings: list[Sampling] = [Sampling()] * batch
        self.trees: Trees | None = None  # of the round under way
        self.accepted: Accepted | None = None  # of the last round
        self._skipped: list[Emitted] = []  # rounds that the proposer has not followed, because it did not draft
        needs_taps = proposer is not None and proposer.needs_taps
        num_taps = len(target.tap_layers) if needs_taps else 0

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(batch, *size, dtype=dtype, device=device)

        self.state = State(
            lengths=zeros(), tokens=zeros(self.num_slots), num_new=zeros() + 1,
            taps=zeros(self.num_slots, num_taps, target.hidden_size, dtype=target.dtype),
            room=zeros(), done=zeros(dtype=torch.bool), seeds=zeros(),
            seen=zeros(target.vocab_size, dtype=torch.bool), news=zeros(1 + self.num_slots),
        )  # fmt: skip
        self._taps = needs_taps
        self._logits = self._seen_taps = self.state.taps

    @property
    def rows_ahead(self) -> int:
        """Cache rows behind the committed ones that a round may touch."""
        return max(self.num_nodes, self.num_slots, *(one.rows_ahead for one in self.proposers))

    def parts(self, shapes: Shapes) -> dict[str, Part]:
        """In this order. No sequence may have more than `num_keys` committed rows and nodes together."""
        return {
            "draft": lambda: self.draft(shapes), "verify": lambda: self.verify(shapes),
            "accept": lambda: self.accept(shapes),
        }  # fmt: skip

    # -- the parts -----------------------------------------------------------------------------------------------------

    def draft(self, shapes: Shapes) -> None:
        """Trees below the roots."""
        emitted = self._emitted(shapes)
        num_levels = self.num_slots - 1 if shapes.num_levels is None else shapes.num_levels
        self.trees = self._without_drafting(emitted, num_levels, shapes.budget)
        if self.trees is not None:
            if self.proposer is not None:
                self._skipped.append(_copy(emitted))
            return
        assert self.proposer is not None
        if self._skipped:
            emitted = _joined([*self._skipped, emitted])
            self._skipped.clear()
        num_keys = shapes.num_keys
        if shapes.lengths is not None:  # beams may need more rows than the tree has nodes
            num_keys = max(shapes.lengths) + self.rows_ahead
        self.proposer.follow(emitted, num_keys)
        num_levels = min(num_levels, self.proposer.num_levels)
        self.trees = self.proposer.propose(emitted, num_levels, num_keys, shapes.budget)

    def _without_drafting(self, emitted: Emitted, num_levels: int, budget: Budget | None) -> Trees | None:
        """The trees of a round in which the proposer does not draft; None where it does."""
        if budget is not None:
            budget.begin()
            if self.free is not None:
                self.free.follow(emitted, 0)
                if num_levels > 0:
                    found = self.free.propose(emitted, min(num_levels, self.free.num_levels), 0)
                    if found.scores is not None and (count := budget.without_drafting(found.scores[0, 1:])):
                        return first_nodes(found, 1 + count)
        if self.proposer is None or num_levels < 1 or (budget is not None and not budget.drafts()):
            return roots_only(emitted.roots)
        return None

    def verify(self, shapes: Shapes) -> None:
        """The target on all nodes."""
        assert self.trees is not None
        num_keys = shapes.num_keys
        if shapes.lengths is not None:  # the tree may have turned out smaller than it could be
            num_keys = max(shapes.lengths) + self.trees.num_nodes
        output = self.verifier.verify(self.trees, self._lengths(shapes), num_keys, taps=self._taps)
        self._logits = self._head(output.last_hidden)
        if output.tap_hidden is not None:
            self._seen_taps = output.tap_hidden

    def accept(self, shapes: Shapes) -> None:
        """The accepted path of each sequence, cut at stop tokens and at its room."""
        trees, state = self.trees, self._state(shapes)
        assert trees is not None
        batch, num_slots = len(state.lengths), min(self.num_slots, trees.num_nodes)
        accepted = accept(
            trees, self._logits, self.samplings[:batch], state.seeds, state.lengths, num_slots,
            lazily=shapes.lengths is not None and self._logits.device.type == "cpu", seen=state.seen,
        )  # fmt: skip
        self.verifier.keep(self._lengths(shapes), accepted)
        tokens, num_accepted = accepted.token_ids, accepted.num_accepted
        if any(sampling.penalises for sampling in self.samplings[:batch]):
            slots = torch.arange(num_slots, device=tokens.device)
            state.seen.scatter_(1, torch.where(slots < num_accepted[:, None], tokens, tokens[:, :1]), True)
        emitted, done = self._cut(state, tokens, num_accepted)
        goes_on = ~done
        taps = state.taps[:, :num_slots]
        if self._taps:
            path = accepted.path[..., None, None].expand(-1, -1, *self._seen_taps.shape[2:])
            taps = torch.where(goes_on[:, None, None, None], self._seen_taps.gather(1, path), taps)
        state.set(
            news=torch.cat((emitted[:, None], tokens), dim=1),
            room=state.room - emitted,
            lengths=state.lengths + num_accepted * goes_on,
            tokens=torch.where(goes_on[:, None], tokens, state.tokens[:, :num_slots]),
            num_new=torch.where(goes_on, num_accepted, state.num_new),
            taps=taps,
            done=done,
        )
        self.accepted = accepted

    def _cut(self, state: State, tokens: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the tokens (B, E) are emitted (B,), and which sequences are done after them (B,)."""
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        stops = self.stops[tokens]
        after_a_stop = stops.cumsum(dim=1) > stops.long()
        fits = slots < torch.minimum(num_accepted, state.room)[:, None]
        kept = fits & ~after_a_stop & ~state.done[:, None]
        emitted = kept.sum(dim=1)
        return emitted, state.done | (stops & kept).any(dim=1) | (emitted >= state.room)

    def _state(self, shapes: Shapes) -> State:
        return self.state if shapes.lengths is None else self.state.first(len(shapes.lengths))

    def _lengths(self, shapes: Shapes) -> Lengths:
        return Lengths(self._state(shapes).lengths, shapes.lengths)

    def _emitted(self, shapes: Shapes) -> Emitted:
        state, slots = self._state(shapes), shapes.num_slots or self.num_slots
        taps = state.taps[:, :slots] if self._taps else None
        return Emitted(state.tokens[:, :slots], state.num_new, taps, state.lengths)

    # -- sequences come and go -----------------------------------------------------------------------------------------

    def start(
        self, slots: slice, prompts: Sequence[Tensor], last_hidden: Tensor, last_taps: Tensor | None, room: Tensor,
        seeds: Tensor, samplings: Sequence[Sampling],
    ) -> None:  # fmt: skip
        """Prompts that were read into these slots begin: their first tokens are the news.

        last_hidden (b, H) and last_taps (b, A, H) are the target's after each prompt's last token; room and seeds (b,).
        """
        self._skipped.clear()
        self.samplings[slots] = samplings
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=room.device)
        noise = uniforms(seeds, lengths[:, None])[:, 0] if any(one.temperature for one in samplings) else None
        state = State(**{field.name: getattr(self.state, field.name)[slots] for field in dataclasses.fields(State)})
        if any(sampling.penalises for sampling in samplings):
            self._see(state.seen, prompts)
        first = choose_all(self._head(last_hidden), samplings, noise, state.seen)
        state.seen.scatter_(1, first[:, None], True)
        one = torch.ones_like(first)
        state.set(
            lengths=lengths, tokens=first[:, None], num_new=one, room=room - 1, seeds=seeds,
            done=self.stops[first] | (room <= 1), news=torch.stack((one, first), dim=1),
        )  # fmt: skip
        if self._taps and last_taps is not None:
            state.set(taps=last_taps[:, None])

    @staticmethod
    def _see(seen: Tensor, prompts: Sequence[Tensor]) -> None:
        """Forget the last sequences of these slots and see their prompts."""
        seen.zero_()
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt[prompt < len(row)]] = True  # ids without a logit, of pictures say, are never chosen

    def move(self, source: int, goal: int) -> None:
        """The sequence of slot `source` goes on in slot `goal`, whose own has ended."""
        self.state.move(source, goal)
        self.samplings[goal] = self.samplings[source]
        self.verifier.move(source, goal)
        for proposer in self.proposers:
            proposer.move(source, goal)

    def release(self, slot: int) -> None:
        """The sequence of this slot has left. With fixed shapes the slot is computed all the same: as a short one."""
        self.state.lengths[slot] = self.state.num_new[slot] = 1
        self.state.done[slot] = True

    def forget(self) -> None:
        """A state as after prompts of one token: something to rehearse with."""
        one = torch.ones_like(self.state.lengths)
        self.state.set(lengths=one, num_new=one, tokens=torch.zeros_like(self.state.tokens), done=one < 0)


def _copy(emitted: Emitted) -> Emitted:
    taps = None if emitted.taps is None else emitted.taps.clone()
    return Emitted(emitted.token_ids.clone(), emitted.num_new.clone(), taps, emitted.lengths.clone())


def _joined(rounds: Sequence[Emitted]) -> Emitted:
    """What several rounds of one sequence emitted, end to end."""
    assert all(len(one.num_new) == 1 for one in rounds), "a budget decides for one sequence at a time"
    taps = [one.taps for one in rounds if one.taps is not None]
    return Emitted(
        torch.cat([one.token_ids for one in rounds], dim=1), torch.stack([one.num_new for one in rounds]).sum(0),
        torch.cat(taps, dim=1) if taps else None, rounds[-1].lengths,
    )  # fmt: skip
