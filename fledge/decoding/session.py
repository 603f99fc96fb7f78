"""The engine: requests join a session, rounds answer them, finished ones leave.

    prompts --prefill--> first tokens --> [ draft a tree -> verify it in one target forward -> accept a path + bonus ]*

Every way to decode is this loop: plain decoding is a tree of one node, a stream is a session of one request,
regeneration one of thousands that waits until slots are free. On a CPU, and for targets, proposers and budgets that
need the host, rounds have exact shapes and are read at once. On a GPU shapes are fixed, rounds are captured, and the
host reads a round behind:

    host     launch 1 | launch 2, read 1 | launch 3, read 2 | ..
    device            [ round 1 ][ round 2 ][ round 3 ] ..
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fledge.decoding.capture import Captured, Timer, run_parts
from fledge.decoding.exact import verifier_of
from fledge.decoding.memory import check_memory
from fledge.decoding.noise import seed_word
from fledge.decoding.probe import ability_of
from fledge.decoding.records import RoundTrace, Sampling
from fledge.decoding.requests import Request, RequestState, check_request
from fledge.decoding.round import Round, Shapes
from fledge.decoding.verifier import ModelInputs
from fledge.drafters.base import Drafter
from fledge.drafters.registry import free_proposer, proposer_of
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.record import TargetOutput

BUCKET = 256  # rows: caches grow, and fixed shapes are captured, in steps of so many
PREPARED = 8  # buckets captured before a session begins; later ones when it reaches them
PREFILL_TOKENS = 2048  # filled-up tokens of prompts that are read together


@dataclass
class _Flight:
    """A round that was launched and not read yet."""

    news: Tensor  # (B, 1 + E) on the host, once `event` has happened
    event: Any
    timer: Timer
    states: list[RequestState | None]  # who sat in the slots


@dataclass
class Session:
    """Sequences of one target and drafter, at most `batch_size` at a time. See `open_session`."""

    target: Target
    drafter: Drafter | None
    tree: TreeShape
    batch_size: int
    capacity: int
    fixed: bool = False
    by_cost: bool = False  # a budget decides in every round, also about drafts that take no time
    stop_token_ids: frozenset[int] = frozenset()
    law: Sampling = Sampling()  # of all requests where shapes are fixed: what is captured holds it
    budget: Any = None  # an adaptive.AdaptiveBudget; exact shapes and one sequence only
    choice: Any = None  # an adaptive.TreeChoice that learns from the rounds of one sequence
    waiting: deque[RequestState] = field(default_factory=deque)

    def __post_init__(self) -> None:
        target, batch, capacity = self.target, self.batch_size, in_buckets(self.capacity)
        verifier = verifier_of(target, batch, 0)
        drafter, free = self.drafter, None
        if drafter is not None and self.by_cost:
            free = free_proposer(drafter, self.tree, batch)
            drafter = None if drafter.takes_no_time else drafter
        proposer = proposer_of(drafter, self.tree, batch, 0) if drafter is not None else None
        assert proposer is None or not verifier.chains_only or self.tree.top_k == 1, "a tree where chains are possible"
        self._rope_limit = ability_of(target).rope_limit
        self.round = Round(target, verifier, proposer, batch, free)
        self.round.samplings = [self.law] * batch
        self._set_stops()
        self.capacity = 0
        self._reserve(capacity)
        self._slots: list[RequestState | None] = [None] * batch
        on_device = target.device.type == "cuda"
        self._captured = Captured(self.round, target.name) if self.fixed and on_device else None
        self._behind = 1 if self.fixed and on_device else 0
        self._flights: deque[_Flight] = deque()
        self._buffers = [
            torch.zeros_like(self.round.state.news, device="cpu", pin_memory=on_device) for _ in range(2)
        ]  # fmt: skip

    # -- what a user of the session asks

    def add(self, request: Request) -> RequestState:
        """Queue a request; it is read when a slot is free."""
        if self.fixed and request.sampling.law != self.law:
            raise UserError("requests of one session of fixed shapes share one sampling, but for the seed.")
        limit = check_request(self.target, request)
        state = RequestState(request, limit, self.stop_token_ids, self.target.tokenizer)
        state.drafts, state.drafted_depth = self.drafter is not None, self.round.num_slots - 1
        self.waiting.append(state)
        return state

    def cancel(self, state: RequestState) -> None:
        """The request leaves; what it has is kept."""
        state.cancelled = True
        if state in self.waiting:
            self.waiting.remove(state)

    @property
    def num_live(self) -> int:
        return sum(state is not None for state in self._slots)

    @property
    def num_free(self) -> int:
        return self.batch_size - self.num_live

    @property
    def idle(self) -> bool:
        return not self.waiting and self.num_live == 0

    def prepare(self, first: int, last: int) -> None:
        """Capture the buckets of sequences that grow from `first` to `last` rows, before anybody looks at the clock;
        the first few of them, if they are many. The session must be idle."""
        if self._captured is None:
            return
        assert self.idle, "preparing makes up a state"
        self.round.forget()
        buckets = range(self._bucket(first), self._bucket(last) + 1, BUCKET)
        with self.round.verifier.running():
            for bucket in buckets[:PREPARED]:
                self._captured.prepare(bucket)

    def _bucket(self, longest: int) -> int:
        return min(in_buckets(longest + self.round.rows_ahead), self.capacity)

    @torch.inference_mode()
    def step(self) -> list[tuple[RequestState, list[int]]]:
        """Let requests join, run a round, and return the new tokens of every request that has some."""
        with self.round.verifier.running():
            self._drop_finished()
            new = self._admit()
            if new or self.num_live == 0:
                return new
            self._flights.append(self._launch())
            return self._read() if len(self._flights) > self._behind else []

    def run(self) -> None:
        """Steps until every request is answered."""
        with self.round.verifier.running():  # once for all of them
            while not self.idle:
                self.step()

    # -- prompts

    def _admit(self) -> list[tuple[RequestState, list[int]]]:
        """Waiting requests take free slots. Joining costs a forward, so a full batch waits until an eighth is free."""
        if not self.waiting or self.num_free < min(max(self.batch_size // 8, 1), len(self.waiting)):
            return []
        new: list[tuple[RequestState, list[int]]] = []
        while self._flights:  # nobody joins while a round of the old company is under way
            new += self._read()
        self._drop_finished()
        joining = [self.waiting.popleft() for _ in range(min(self.num_free, len(self.waiting)))]
        for group in self._groups(joining):
            new += self._prefill(group)
        return new

    def _groups(self, joining: list[RequestState]) -> list[list[RequestState]]:
        """Requests whose prompts are read together: similar lengths, PREFILL_TOKENS at most when filled up."""
        groups: list[list[RequestState]] = []
        for state in sorted(joining, key=lambda state: len(state.request.prompt_ids)):
            alone = self.round.verifier.one_by_one or self.fixed or bool(state.request.model_inputs)
            width = len(state.request.prompt_ids)
            last = groups[-1] if groups else []
            if last and not alone and not last[0].request.model_inputs and width * (len(last) + 1) <= PREFILL_TOKENS:
                last.append(state)
            else:
                groups.append([state])
        return groups

    def _prefill(self, group: list[RequestState]) -> list[tuple[RequestState, list[int]]]:
        """Read prompts into the next free slots and choose their first tokens."""
        start, device = time.perf_counter(), self.target.device
        prompts = [torch.tensor(state.request.prompt_ids, device=device) for state in group]
        width = max(map(len, prompts))
        self._reserve(in_buckets(width + self.round.rows_ahead))
        first = next(slot for slot in range(self.batch_size) if self._slots[slot] is None)
        slots = slice(first, first + len(group))
        output = self._read_texts(slots, prompts, group[0].request.model_inputs or None)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        rows = torch.arange(len(group), device=device)
        self.round.start(
            slots, prompts, output.last_hidden[rows, ends],
            None if output.tap_hidden is None else output.tap_hidden[rows, ends],
            torch.tensor([state.limit for state in group], device=device),
            torch.tensor([seed_word(state.request.sampling.seed) for state in group], device=device),
            [state.request.sampling for state in group],
        )  # fmt: skip
        self._slots[slots] = group
        tokens = self.round.state.tokens[slots, 0].tolist()
        seconds = time.perf_counter() - start
        return [
            (state, state.started(state.until_stop_string([token]), seconds))
            for state, token in zip(group, tokens, strict=True)
        ]

    def _read_texts(
        self, slots: slice, texts: list[Tensor], inputs: ModelInputs | None, *, again: bool = False
    ) -> TargetOutput:
        """The target and the proposers read texts from their beginning; `again`: those that read the target."""
        proposer, device = self.round.proposer, self.target.device
        positions = self.target.positions(texts[0], inputs) if inputs else None
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        taps = proposer is not None and proposer.needs_taps
        output = self.round.verifier.prefill(slots, padded, taps=taps, positions=positions, model_inputs=inputs)
        for row, text in enumerate(texts):
            known = None if output.tap_hidden is None else output.tap_hidden[row, : len(text)]
            where = torch.arange(len(text), device=device) if positions is None else positions
            for one in self.round.proposers:
                if one.needs_taps or not again:
                    one.fill(slots.start + row, text, known, where)
        return output

    def _read_again(self) -> None:
        """Sequences that have just grown past the limit of a longrope: all their tokens turn by other factors now, so
        what is cached is wrong. The library's `generate` reads them again at the same token."""
        for slot, state in enumerate(self._slots):
            if state is not None and state.length == (self._rope_limit or 0) + 1:
                text = torch.tensor([*state.request.prompt_ids, *state.token_ids], device=self.target.device)
                self._read_texts(slice(slot, slot + 1), [text], state.request.model_inputs or None, again=True)

    # -- rounds

    def _launch(self) -> _Flight:
        """Begin a round, and the copy of its news to the host."""
        timer = Timer(self.target.device)
        longest = max(self._lengths()) + len(self._flights) * self.round.num_slots
        if self.fixed:
            bucket = self._bucket(longest)
            if self._captured is not None:
                self._captured.prepare(bucket)
                timer.lap("begin")
                self._captured.run(bucket, timer.lap)
            else:
                timer.lap("begin")
                run_parts(self.round, Shapes(bucket), timer.lap)
        else:
            self._reserve(in_buckets(longest + self.round.rows_ahead))
            if self._rope_limit is not None:
                self._read_again()
            shapes = self._exact_shapes()
            timer.lap("begin")
            run_parts(self.round, shapes, timer.lap)
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        buffer.copy_(self.round.state.news, non_blocking=True)
        event = None
        if buffer.is_pinned():
            event = torch.cuda.Event()
            event.record()
        return _Flight(buffer, event, timer, list(self._slots))

    def _exact_shapes(self) -> Shapes:
        live = [state for state in self._slots if state is not None]
        lengths = tuple(self._lengths())
        num_levels = min(self.round.num_slots - 1, max(state.room for state in live) - 1)
        if self._rope_limit is not None:  # no tree reaches past it
            before = [self._rope_limit - state.length for state in live if state.length <= self._rope_limit]
            num_levels = min([num_levels, *before])
        return Shapes(
            num_keys=max(lengths) + self.round.rows_ahead, lengths=lengths, num_levels=num_levels, budget=self.budget,
            num_slots=max(state.num_new for state in live),
        )  # fmt: skip

    def _read(self) -> list[tuple[RequestState, list[int]]]:
        """The news of the oldest round under way, waited for, into the records of those it belongs to."""
        flight = self._flights.popleft()
        if flight.event is not None:
            flight.event.synchronize()
        seconds, new = flight.timer.seconds(), []
        rows = flight.news.tolist()
        for slot, state in enumerate(flight.states):
            if state is None or state.finished:
                continue
            count, *tokens = rows[slot]
            kept = state.until_stop_string(tokens[:count])
            trace = self._trace(slot, len(kept)) if state.request.trace else None
            new.append((state, state.emitted(kept, seconds, trace)))
            for learning in (self.budget, self.choice):
                if learning is not None:
                    learning.record(count)
        return new

    def _trace(self, slot: int, emitted: int) -> RoundTrace:
        """The round just read, as a tree. Exact shapes only: nothing has overwritten it."""
        trees, accepted = self.round.trees, self.round.accepted
        assert trees is not None and accepted is not None and not self.fixed, "traces need exact shapes"
        count = int(accepted.num_accepted[slot])
        path, bonus = accepted.path[slot, :count].tolist(), int(accepted.token_ids[slot, count - 1])
        whole = emitted == count
        return RoundTrace(
            trees.token_ids[slot].tolist(), trees.parents[slot].tolist(), path[: emitted + (not whole)],
            bonus if whole else None, None if trees.scores is None else trees.scores[slot].tolist(),
        )  # fmt: skip

    # -- slots

    def _lengths(self) -> list[int]:
        """Committed rows of the live sequences, as far as the host has read."""
        return [s.length - 1 for s in self._slots if s is not None]

    def _drop_finished(self) -> None:
        """Finished sequences leave. With exact shapes the last ones move into their slots, so that no gap is left."""
        for slot, state in enumerate(self._slots):
            if state is not None and (state.finished or state.cancelled):
                self._slots[slot] = None
                self.round.release(slot)
        if self.fixed:
            return
        live = [slot for slot, state in enumerate(self._slots) if state is not None]
        for goal in range(len(live)):
            if self._slots[goal] is None:
                source = live.pop()
                self.round.move(source, goal)
                self._slots[goal], self._slots[source] = self._slots[source], None

    def _reserve(self, capacity: int) -> None:
        """Caches of `capacity` rows at least; a UserError where there is no memory for them."""
        if capacity <= self.capacity:
            return
        assert not self.fixed or not self.capacity, "fixed shapes do not grow"
        check_memory(self.target, self.batch_size, capacity)
        self.round.verifier.reserve(capacity)
        for proposer in self.round.proposers:
            proposer.reserve(capacity)
        self.capacity = capacity

    def _set_stops(self) -> None:
        inside = [token for token in self.stop_token_ids if 0 <= token < self.target.vocab_size]
        self.round.stops.zero_()[torch.tensor(inside, dtype=torch.int64, device=self.target.device)] = True


def rows_ahead(tree: TreeShape) -> int:
    """At least `Round.rows_ahead` of any drafter."""
    return max(tree.total_token, tree.levels + 1, min(tree.top_k, tree.total_token) * tree.levels)


def in_buckets(num_rows: int) -> int:
    """Rows, in whole buckets."""
    return -(-num_rows // BUCKET) * BUCKET
