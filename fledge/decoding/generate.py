"""The decoding loops: plain, and speculative with a draft tree. Both emit exactly the target's law.

    prompt --prefill--> first token --> draft a tree --> verify it in one target forward --> accept a path + bonus --.
                                            ^                                                                        |
                                            '--------------- target features of the accepted tokens ----------------'

Plain decoding is the same machine with a tree of one node: same cache, same masks, same head, same clocks.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fledge.decoding.accept import accept, choose
from fledge.decoding.adaptive import Pace
from fledge.decoding.drafting import Drafter
from fledge.decoding.records import Generation, RoundTrace, Sampling, TreeShape
from fledge.decoding.tree import Tree, root_only
from fledge.decoding.verifying import verifier_of
from fledge.draft.model import DraftModel
from fledge.errors import UserError
from fledge.target.model import Target

__all__ = ["Generation", "RoundTrace", "Sampling", "TreeShape", "generate_plain", "generate_speculative"]

OnTokens = Callable[[list[int]], None]
ModelInputs = Mapping[str, Tensor]


@torch.inference_mode()
def generate_plain(
    target: Target,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int] | None = None,
    trace: bool = False,
    on_tokens: OnTokens | None = None,
    model_inputs: ModelInputs | None = None,
) -> Generation:
    """One token per target forward. `on_tokens` is called with every new token as it appears.

    `model_inputs` is what the target takes beside the prompt's ids: the pixels of its pictures and their like.
    """
    limit = _limit(target, prompt_ids, max_new_tokens)
    verifier, generator = verifier_of(target), _generator(target, sampling)
    clock = _Clock(target.device)
    writer = _Writer(limit, _eos(target, eos_token_ids), on_tokens)
    rounds: list[RoundTrace] = []
    with verifier.session(len(prompt_ids) + limit):
        prompt = torch.tensor(prompt_ids, device=target.device)
        output = verifier.prefill(
            prompt, taps=False, positions=_positions(target, prompt, model_inputs), model_inputs=model_inputs
        )
        token = choose(target.head(output.last_hidden[0, -1:]), sampling, generator)
        writer.write(token.tolist())
        clock.lap("prefill")
        while not writer.finished:
            output = verifier.verify(root_only(token), 0, taps=False)
            logits = target.head(output.last_hidden[0])
            clock.lap("verify")
            previous, token = token, choose(logits, sampling, generator)
            verifier.keep([0])
            new = token.tolist()
            clock.lap("accept")
            writer.write(new)
            if trace:
                rounds.append(RoundTrace(previous.tolist(), [0], [0], new[0]))
            clock.lap("other")
    return writer.generation(clock, accepted=[], drafted_depth=0, rounds=rounds if trace else None)


@torch.inference_mode()
def generate_speculative(
    target: Target,
    draft: DraftModel,
    prompt_ids: Sequence[int],
    *,
    tree: TreeShape,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int] | None = None,
    trace: bool = False,
    on_tokens: OnTokens | None = None,
    model_inputs: ModelInputs | None = None,
    pace: Pace | None = None,
) -> Generation:
    """A verified path of draft tokens and the target's own bonus token per target forward.

    With a `pace`, `tree` is the most that is drafted; rounds that drafting cannot pay for decode plainly.
    """
    limit = _limit(target, prompt_ids, max_new_tokens)
    _check_pair(target, draft)
    verifier, generator = verifier_of(target), _generator(target, sampling)
    if verifier.chains_only and tree.top_k > 1 and tree.levels > 0:
        raise UserError(
            f"{target.name}: its layers keep a running state, which can follow a chain of drafts but no tree. Use a "
            f"chain: --top-k 1 (found {tree.top_k})."
        )
    clock = _Clock(target.device)
    writer = _Writer(limit, _eos(target, eos_token_ids), on_tokens)
    accepted: list[int] = []
    rounds: list[RoundTrace] = []
    num_rows = len(prompt_ids) + limit
    with verifier.session(num_rows + tree.total_token):
        prompt = torch.tensor(prompt_ids, device=target.device)
        positions = _positions(target, prompt, model_inputs)
        output = verifier.prefill(prompt, taps=True, positions=positions, model_inputs=model_inputs)
        first = choose(target.head(output.last_hidden[0, -1:]), sampling, generator)
        writer.write(first.tolist())
        clock.lap("prefill")
        drafter = Drafter(draft, tree, num_rows, positions)
        new_tokens, tap_hidden = torch.cat((prompt[1:], first)), _taps(output)
        unread: list[tuple[Tensor, Tensor]] = []  # tokens and taps the head has not followed yet
        while not writer.finished:
            levels = min(tree.levels, writer.room - 1)  # deeper nodes could not be emitted
            unread.append((new_tokens, tap_hidden))
            if levels < 1 or (pace is not None and not pace.drafts()):
                nodes = root_only(new_tokens[-1:])  # room for one token only, or a round of plain decoding
            else:
                followed, features = (torch.cat(parts) for parts in zip(*unread, strict=True))
                unread.clear()
                hidden = drafter.extend(followed, draft.fuse(features))
                nodes = drafter.grow(followed[-1:], hidden, levels, pace)
            clock.lap("draft")
            output = verifier.verify(nodes, levels, taps=True)
            logits = target.head(output.last_hidden[0])
            clock.lap("verify")
            path, new_tokens = accept(nodes, logits, sampling, generator)
            rows, new = path.tolist(), new_tokens.tolist()
            verifier.keep(rows)
            tap_hidden = _taps(output)[path]
            clock.lap("accept")
            emitted = writer.write(new)
            accepted.append(emitted - 1)
            if pace is not None:
                pace.record(emitted)
            if trace:
                rounds.append(_trace(nodes, rows, new, emitted))
            clock.lap("other")
    drafted_depth = tree.levels
    return writer.generation(clock, accepted=accepted, drafted_depth=drafted_depth, rounds=rounds if trace else None)


def _positions(target: Target, prompt: Tensor, model_inputs: ModelInputs | None) -> Tensor | None:
    """The prompt's rope positions; None where they are the tokens' indices."""
    return target.positions(prompt, model_inputs) if model_inputs else None


def _taps(output) -> Tensor:
    assert output.tap_hidden is not None
    return output.tap_hidden[0]


def _trace(nodes: Tree, rows: list[int], new: list[int], emitted: int) -> RoundTrace:
    bonus = new[-1] if emitted == len(new) else None
    return RoundTrace(nodes.token_ids.tolist(), nodes.parents.tolist(), rows[: emitted + (bonus is None)], bonus)


# -- the boundary ------------------------------------------------------------------------------------------------------


def _limit(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
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
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but {target.name} has {longest} positions "
            f"(max_position_embeddings). Shorten the prompt."
        )
    return min(max_new_tokens, longest - len(prompt_ids))


def _check_pair(target: Target, draft: DraftModel) -> None:
    if tuple(draft.config.tap_layers) != target.tap_layers:
        raise UserError(
            f"the head was trained on tap layers {list(draft.config.tap_layers)}, the target taps "
            f"{list(target.tap_layers)}. Load the target with the head's tap layers."
        )


def _eos(target: Target, given: Sequence[int] | None) -> frozenset[int]:
    return frozenset(target.eos_token_ids if given is None else given)


def _generator(target: Target, sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device=target.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


class _Writer:
    """The emitted tokens: nothing after the first EOS, nothing past the limit."""

    def __init__(self, limit: int, eos_token_ids: frozenset[int], on_tokens: OnTokens | None) -> None:
        self.token_ids: list[int] = []
        self.stopped = False
        self._limit, self._eos, self._on_tokens = limit, eos_token_ids, on_tokens

    @property
    def room(self) -> int:
        return self._limit - len(self.token_ids)

    @property
    def finished(self) -> bool:
        return self.stopped or self.room == 0

    def write(self, new: list[int]) -> int:
        """Emit a round's tokens up to EOS or the limit; returns how many."""
        new = new[: self.room]
        for index, token in enumerate(new):
            if token in self._eos:
                new, self.stopped = new[: index + 1], True
                break
        self.token_ids += new
        if self._on_tokens is not None:
            self._on_tokens(new)
        return len(new)

    def generation(
        self, clock: "_Clock", *, accepted: list[int], drafted_depth: int, rounds: list[RoundTrace] | None
    ) -> Generation:
        """Close the books."""
        return Generation(
            token_ids=self.token_ids,
            accepted=accepted,
            drafted_depth=drafted_depth,
            finish_reason="stop" if self.stopped else "length",
            ttft_s=clock.phases_s["prefill"],
            decode_s=sum(clock.phases_s.values()) - clock.phases_s["prefill"],
            phases_s=clock.phases_s,
            num_forwards=len(accepted) if drafted_depth else len(self.token_ids) - 1,
            rounds=rounds,
        )


class _Clock:
    """Where the time goes: each lap belongs to the phase that just ended. Waits for the device before it reads."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self.phases_s = dict.fromkeys(("prefill", "draft", "verify", "accept", "other"), 0.0)
        self._last = self._now()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.phases_s[phase] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()
