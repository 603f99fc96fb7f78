"""The static engine: rounds launched one after another, their news read a round behind, buckets chosen by the host.

    host     launch 1 | launch 2, read 1 | launch 3, read 2 | ..
    device            [ round 1 ][ round 2 ][ round 3 ] ..

What crosses to the host is one copy of `State.news` per round. The host knows each sequence's length up to the rounds
in flight, and that is enough to choose a bucket: the cached rows a round sees, a multiple of BUCKET. On a CPU nothing
is in flight and every round is read at once.
"""

import dataclasses
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fledge.decoding.asked import check_pair, emission_limit, stop_ids
from fledge.decoding.captured import Captured, Stopwatch, run_parts
from fledge.decoding.records import Generation, Sampling, TreeShape
from fledge.decoding.static_round import Round
from fledge.decoding.writing import Writer
from fledge.draft.model import DraftModel
from fledge.errors import UserError
from fledge.target.model import Target

BUCKET = 256
PREPARED = 8  # buckets captured before a generation begins; later ones when it reaches them
KEPT_ENGINES = 2  # per target: its caches and graphs are kept for the next generation (plain and speculative, say)

_engines: "weakref.WeakKeyDictionary[Target, OrderedDict[tuple, StaticEngine]]" = weakref.WeakKeyDictionary()


def static_engine(
    target: Target, draft: DraftModel | None, tree: TreeShape, batch: int, num_rows: int, sampling: Sampling
) -> "StaticEngine":
    """The target's engine for such generations of at most `num_rows` rows: a kept one when there is one."""
    kept = _engines.setdefault(target, OrderedDict())
    law = dataclasses.replace(sampling, seed=None)
    key = (id(draft), tree if draft is not None else None, batch, law, BUCKET)
    engine = kept.pop(key, None)
    if engine is None or engine.num_rows < num_rows:
        engine = None  # free its caches first
        while len(kept) >= KEPT_ENGINES:
            kept.popitem(last=False)
        engine = StaticEngine(target, draft, tree, batch, num_rows, law)
    kept[key] = engine
    return engine


class StaticEngine:
    """Generations of a fixed number of sequences, one generation at a time."""

    def __init__(
        self, target: Target, draft: DraftModel | None, tree: TreeShape, batch: int, num_rows: int, sampling: Sampling
    ) -> None:
        num_rows = in_buckets(num_rows)
        self.num_rows, self.draft = num_rows, draft  # the head is kept: the key of `static_engine` holds its id
        self.round = Round(target, draft, tree, batch, num_rows + in_buckets(rows_ahead(tree)), sampling)
        on_device = target.device.type == "cuda"
        self.captured = Captured(self.round) if on_device else None
        self.in_flight = 1 if on_device else 0
        self._buffers: list[Tensor] = [
            torch.zeros_like(self.round.state.news, device="cpu", pin_memory=on_device) for _ in range(2)
        ]
        self._turn = 0
        self.generation = 0  # counted, so that a generation notices that another one has taken its place

    def begin(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stops: frozenset[int]) -> None:
        """Read the prompts; the first tokens are the news."""
        device, rows = self.round.target.device, self.round.target.vocab_size
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        inside = torch.tensor([stop for stop in stops if 0 <= stop < rows], dtype=torch.int64, device=device)
        self.generation += 1
        self.round.begin(ids, torch.tensor(limits, device=device), inside)

    def seed(self, seed: int | None) -> None:
        """Where the draws begin; None: anywhere."""
        generator = self.round.generator
        if generator is not None:
            generator.seed() if seed is None else generator.manual_seed(seed)

    def launch(self, longest: int, watch: Stopwatch) -> None:
        """One round; no sequence has more than `longest` committed rows."""
        bucket = self._bucket(longest)
        with self.round.running():
            if self.captured is None:
                watch.lap("begin")
                run_parts(self.round, bucket, watch.lap)
            else:
                self.captured.prepare(bucket)
                watch.lap("begin")
                self.captured.run(bucket, watch.lap)

    def prepare(self, first: int, last: int) -> None:
        """Capture the buckets of generations that grow from `first` to `last` rows, before anybody looks at the clock;
        the first few of them, if they are many."""
        if self.captured is None:
            return
        self.round.forget()
        buckets = range(self._bucket(first), self._bucket(last) + 1, BUCKET)
        with self.round.running():
            for bucket in buckets[:PREPARED]:
                self.captured.prepare(bucket)

    def _bucket(self, longest: int) -> int:
        return min(in_buckets(longest + self.round.rows_ahead), self.round.capacity)

    def send(self) -> "News":
        """Begin the copy of the news to the host."""
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        buffer.copy_(self.round.state.news, non_blocking=True)
        if not buffer.is_pinned():
            return News(buffer, None)
        event = torch.cuda.Event()
        event.record()
        return News(buffer, event)


@dataclasses.dataclass(frozen=True)
class News:
    """A copy under way; `read` before the next but one is sent."""

    buffer: Tensor
    event: torch.cuda.Event | None

    def read(self) -> list[list[int]]:
        """Every sequence's new tokens, waited for."""
        if self.event is not None:
            self.event.synchronize()
        return [tokens[:count] for count, *tokens in self.buffer.tolist()]


class BatchGeneration:
    """One generation of several sequences: iterate over its rounds, then close the books."""

    def __init__(
        self, target: Target, draft: DraftModel | None, prompts: Sequence[Sequence[int]], *, tree: TreeShape,
        max_new_tokens: int, sampling: Sampling, eos_token_ids: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        if not prompts:
            raise UserError("there are no prompts to answer. Give at least one.")
        if draft is not None:
            check_pair(target, draft)
        self._prompts = prompts
        self._limits = [emission_limit(target, prompt, max_new_tokens) for prompt in prompts]
        self._stops = stop_ids(target, eos_token_ids)
        num_rows = max(len(prompt) + limit for prompt, limit in zip(prompts, self._limits, strict=True))
        self._engine = static_engine(target, draft, tree, len(prompts), num_rows, sampling)
        self._engine.prepare(max(map(len, prompts)), num_rows)
        self._start = time.perf_counter()
        self._seed, self._drafts = sampling.seed, draft is not None
        self._drafted_depth = tree.levels if draft is not None else 0
        self._writers = [Writer(limit, self._stops, None) for limit in self._limits]
        self._accepted: list[list[int]] = [[] for _ in prompts]
        self._phases_s: list[dict[str, float]] = [{} for _ in prompts]
        self._spent = dict.fromkeys(("prefill", "draft", "verify", "accept", "other"), 0.0)

    def rounds(self) -> Iterator[list[list[int]]]:
        """Every sequence's new tokens, round by round, the prefill's first; none for those that have ended."""
        engine = self._engine
        engine.seed(self._seed)
        engine.begin(self._prompts, self._limits, self._stops)
        mine, in_flight = engine.generation, deque[tuple[News, Stopwatch]]()
        yield self._noted(engine.send().read(), None)
        while not all(writer.finished for writer in self._writers):
            if engine.generation != mine:
                raise UserError(
                    "another generation began on this target while this one was streaming, and took its cache. Finish "
                    "one stream before the next, or answer the prompts as one batch."
                )
            if len(in_flight) > engine.in_flight:
                news, watch = in_flight.popleft()
                yield self._noted(news.read(), watch)
                continue
            watch = Stopwatch(engine.round.target.device)
            engine.launch(self._longest(len(in_flight)), watch)
            in_flight.append((engine.send(), watch))

    def generations(self) -> list[Generation]:
        """The books of every sequence; its time ends with its own last token."""
        return [
            writer.generation(phases_s, accepted=accepted, drafted_depth=self._drafted_depth, rounds=None)
            for writer, phases_s, accepted in zip(self._writers, self._phases_s, self._accepted, strict=True)
        ]

    def _longest(self, num_unread: int) -> int:
        """The most committed rows a sequence can have after so many unread rounds."""
        read = (len(p) + len(w.token_ids) - 1 for p, w in zip(self._prompts, self._writers, strict=True))
        return max(read) + num_unread * self._engine.round.num_slots

    def _noted(self, new: list[list[int]], watch: Stopwatch | None) -> list[list[int]]:
        """Write a round's tokens and times into the books of those it belongs to."""
        going_on = [not writer.finished for writer in self._writers]
        self._note_time(watch)
        for sequence, tokens in enumerate(new):
            if not going_on[sequence]:
                assert not tokens, f"{sequence=} has ended, {tokens=}"
                continue
            writer = self._writers[sequence]
            emitted = writer.write(tokens)
            assert emitted == len(tokens) > 0, f"{sequence=} {tokens=} {emitted=}"
            if watch is not None and self._drafts:
                self._accepted[sequence].append(emitted - 1)
            self._phases_s[sequence] = dict(self._spent)
        return new

    def _note_time(self, watch: Stopwatch | None) -> None:
        """Parts as measured; what they leave of the time since the prefill is the host's: `other`."""
        now = time.perf_counter()
        if watch is None:
            self._spent["prefill"], self._first = now - self._start, now
            return
        for name, seconds in watch.seconds().items():
            self._spent[name] += seconds
        parts = sum(self._spent[name] for name in ("draft", "verify", "accept"))
        self._spent["other"] = max(now - self._first - parts, 0.0)


def in_buckets(num_rows: int) -> int:
    """Rows, in whole buckets."""
    return -(-num_rows // BUCKET) * BUCKET


def rows_ahead(tree: TreeShape) -> int:
    """At least `Round.rows_ahead` of any head."""
    return max(tree.total_token, tree.levels + 1, min(tree.top_k, tree.total_token) * tree.levels)
