"""The decoding loops: plain, and speculative with a draft tree. Both emit exactly the target's law.

    prompt --prefill--> first token --> draft a tree --> verify it in one target forward --> accept a path + bonus --.
                                            ^                                                                        |
                                            '--------------- target features of the accepted tokens ----------------'

Plain decoding is the same machine with a tree of one node: same cache, same masks, same head, same clocks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fledge.decoding.accept import accept, choose
from fledge.decoding.adaptive import Pace
from fledge.decoding.asked import check_pair, emission_limit, seeded_generator, stop_ids
from fledge.decoding.drafting import Drafter
from fledge.decoding.records import Generation, RoundTrace, Sampling, TreeShape
from fledge.decoding.tree import Tree, root_only
from fledge.decoding.verifying import verifier_of
from fledge.decoding.writing import Clock, OnTokens, Writer
from fledge.draft.model import DraftModel
from fledge.errors import UserError
from fledge.target.model import Target

__all__ = ["Generation", "RoundTrace", "Sampling", "TreeShape", "generate_plain", "generate_speculative"]

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
    limit = emission_limit(target, prompt_ids, max_new_tokens)
    verifier, generator = verifier_of(target), seeded_generator(target, sampling)
    clock = Clock(target.device)
    writer = Writer(limit, stop_ids(target, eos_token_ids), on_tokens)
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
    return writer.generation(clock.phases_s, accepted=[], drafted_depth=0, rounds=rounds if trace else None)


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
    limit = emission_limit(target, prompt_ids, max_new_tokens)
    check_pair(target, draft)
    verifier, generator = verifier_of(target), seeded_generator(target, sampling)
    if verifier.chains_only and tree.top_k > 1 and tree.levels > 0:
        raise UserError(
            f"{target.name}: its layers keep a running state, which can follow a chain of drafts but no tree. Use a "
            f"chain: --top-k 1 (found {tree.top_k})."
        )
    clock = Clock(target.device)
    writer = Writer(limit, stop_ids(target, eos_token_ids), on_tokens)
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
    traced = rounds if trace else None
    return writer.generation(clock.phases_s, accepted=accepted, drafted_depth=tree.levels, rounds=traced)


def _positions(target: Target, prompt: Tensor, model_inputs: ModelInputs | None) -> Tensor | None:
    """The prompt's rope positions; None where they are the tokens' indices."""
    return target.positions(prompt, model_inputs) if model_inputs else None


def _taps(output) -> Tensor:
    assert output.tap_hidden is not None
    return output.tap_hidden[0]


def _trace(nodes: Tree, rows: list[int], new: list[int], emitted: int) -> RoundTrace:
    bonus = new[-1] if emitted == len(new) else None
    return RoundTrace(nodes.token_ids.tolist(), nodes.parents.tolist(), rows[: emitted + (bonus is None)], bonus)
