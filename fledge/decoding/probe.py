"""The self-test of a target: what decoding may ask of it, tried out before its first session.

A stock model computes the same hidden states for a text however the text is cut into forwards: whole, token by token
behind a cache, as a chunk, as a path of a tree. Some models do not: they add biases by row instead of position, forget
their state when a chunk comes, or change their rope with the length. No config says so. So a few random tokens are run
through the verifiers and compared with the library's plain forward of the same text. The first way that agrees is used:

    trees     our cache, rows of trees behind it                          (`AttentionVerifier`)
    chains    the library's cache, rolled back where drafts are refused   (`RunningStateVerifier`)
    plain     the library's cache, token by token                         (the same)
    -         refused

Nothing is compared with the head of a drafter: whether the answer is the target's own depends on the target alone.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from fledge.console import say
from fledge.decoding.accept import Accepted
from fledge.decoding.running_state import RunningStateVerifier, keeps_running_state
from fledge.decoding.verifier import AttentionVerifier, Lengths, Verifier
from fledge.drafters.tree import Trees, TreeShape, ancestors_of
from fledge.errors import UserError
from fledge.target.model import Target, longrope_limit

Way = Literal["trees", "chains", "plain"]
Rounds = Sequence[tuple[Sequence[int], Sequence[int]]]  # parents of a tree's nodes, and the nodes that are kept

# Relative error of a hidden state that rounding explains. Rounding alone: 1e-6 in fp32; 0.01 to 0.03 in bf16 (SmolLM2
# and the tests' targets). Faults: 0.12 (Jamba's chains) to 0.3 (MPT's trees) and more, in both.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.08}
TRIES = 3  # rounding can send a token to another expert, once; a fault shows on all tokens
PROMPT = 8  # tokens

# What shows only in texts that are too long for a test. model_type of the text config -> why it decodes without drafts.
STEPS_ONLY = {
    "doge": "among keys of equal scores its attention picks other ones when several rows are computed at once"
}

# Four children, so that a node's row is far from its position; the deepest path is kept, so that rows must move.
TREES: Rounds = (((0, 0, 0, 0, 0, 4, 4, 6), (0, 4, 6)), ((0,), (0,)))
# Two sequences of different lengths.
BATCH: Rounds = (((0, 0, 0, 2), (0,)),)
# A part of the first chain is refused; the second follows what was kept of it.
CHAINS: Rounds = (((0, 0, 1, 2), (0, 1)), ((0, 0, 1), (0, 1, 2)), ((0,), (0,)))
STEPS: Rounds = (((0,), (0,)),) * 4


@dataclass(frozen=True)
class Trial:
    """A way to decode, and what it must compute as plain forwards do."""

    most: Way
    own_cache: bool  # our cache for many sequences; else the library's, sequence by sequence
    what: str
    runs: tuple[tuple[Rounds, tuple[int, ...]], ...]  # with the lengths of the sequences' prompts


TRIALS = (
    Trial("trees", True, "a tree", ((TREES, (PROMPT,)), (BATCH, (PROMPT, PROMPT - 3)))),
    Trial("chains", False, "a chain of drafts", ((CHAINS, (PROMPT,)),)),
    Trial("plain", False, "a token behind its cache", ((STEPS, (PROMPT,)),)),
)


@dataclass(frozen=True)
class Ability:
    """What decoding may ask of a target."""

    most: Way
    own_cache: bool  # as of a trial
    reason: str = ""  # why it is not more
    rope_limit: int | None = None  # longer sequences have another rope for *all* tokens, so they are read again there


_abilities: "weakref.WeakKeyDictionary[Target, Ability]" = weakref.WeakKeyDictionary()
_told: "weakref.WeakSet[Target]" = weakref.WeakSet()


def ability_of(target: Target) -> Ability:
    """What the self-test found, run once per target; a UserError where no way to decode is right."""
    if target not in _abilities:
        _abilities[target] = probe(target)
    return _abilities[target]


def trust(target: Target, ability: Ability) -> None:
    """Skip the self-test: decode as if it had found this."""
    _abilities[target] = ability


def _verifier(target: Target, own_cache: bool, batch: int, capacity: int) -> Verifier:
    return AttentionVerifier(target, batch, capacity) if own_cache else RunningStateVerifier(target, batch)


def shape_for(target: Target, shape: TreeShape) -> TreeShape | None:
    """What may be drafted instead of this shape, None for nothing; says once per target why it is less."""
    ability = ability_of(target)
    if ability.most == "trees" or (ability.most == "chains" and shape.top_k == 1):
        return shape
    if target not in _told:
        _told.add(target)
        way = "drafts chains instead of trees" if ability.most == "chains" else "decodes without drafts"
        say(f"{target.name}: {way}, because {ability.reason}.")
    return replace(shape, top_k=1) if ability.most == "chains" else None


@torch.inference_mode()
def probe(target: Target) -> Ability:
    """Try the ways to decode, the best first."""
    reasons: list[str] = []
    for trial in TRIALS:
        reason = _fault(target, trial)
        if reason is None:
            rope_limit = _rope_limit(target)
            if trial.own_cache or rope_limit is None:
                return Ability(trial.most, trial.own_cache, reasons[-1] if reasons else "", rope_limit)
            reason = "its rope changes with the length, and our cache does not fit it"
        reasons.append(reason)
    raise UserError(
        f"{target.name}: cannot be decoded here, because {reasons[-1]}. Serve it "
        f"with vLLM or SGLang; heads can be trained for it all the same."
    )


def _fault(target: Target, trial: Trial) -> str | None:
    """What is wrong with this way to decode; None where it agrees with plain forwards."""
    if trial.most != "plain" and (known := STEPS_ONLY.get(target.text_config.model_type)):
        return known
    if trial.own_cache and keeps_running_state(target):
        return "its layers keep a running state, which can follow a chain but no tree"
    bound = _tolerance(target)
    try:
        error = max(least_error(partial(rounds_error, target, trial.own_cache, *run), bound) for run in trial.runs)
    except UserError as refusal:
        return str(refusal).removeprefix(f"{target.name}: ").rstrip(".")
    except torch.OutOfMemoryError:
        raise
    except Exception as crash:  # models are written for the library's own masks and caches, and fail in any way
        words = (str(crash).strip() or "no message").splitlines()[0][:120]
        return f"it cannot compute {trial.what} ({type(crash).__name__}: {words})"
    if error <= bound:
        return None
    return (
        f"its hidden states of {trial.what} differ by {error:.0%} from those of a plain forward of the same text "
        f"(rounding explains {bound:.1%})"
    )


def _tolerance(target: Target) -> float:
    return TOLERANCE.get(target.dtype, TOLERANCE[torch.bfloat16])


def least_error(error_of: Callable[[int], float], bound: float) -> float:
    """The least error of a few tries; one below the bound is enough."""
    least = math.inf
    for seed in range(TRIES):
        least = min(least, error_of(seed))
        if least <= bound:
            break
    return least


# -- one comparison ----------------------------------------------------------------------------------------------------


def rounds_error(target: Target, own_cache: bool, rounds: Rounds, lengths: Sequence[int], seed: int) -> float:
    """Sequences with prompts of these lengths go through the rounds; the largest relative error of a node's state."""
    draw = random_tokens(target, seed)
    texts = [draw(length) for length in lengths]
    padded = _padded(target, texts)
    found: list[tuple[list[int], Tensor]] = []  # tokens up to a node, and its state
    capacity = max(lengths) + sum(len(parents) for parents, _ in rounds)
    verifier = _verifier(target, own_cache, len(texts), capacity)
    with verifier.running():
        verifier.prefill(slice(0, len(texts)), padded, taps=False)
        for parents, kept in rounds:
            tokens = [draw(len(parents)) for _ in texts]
            rows = Lengths(torch.tensor([len(text) for text in texts], device=target.device), tuple(map(len, texts)))
            trees = _trees(tokens, parents, target.device)
            output = verifier.verify(trees, rows, max(map(len, texts)) + len(parents), taps=False)
            for text, drafted, states in zip(texts, tokens, output.last_hidden, strict=True):
                paths = _compared(parents)
                found += [([*text, *(drafted[i] for i in path)], states[path[-1]].clone()) for path in paths]
                text += [drafted[node] for node in kept]
            path = torch.tensor([list(kept)] * len(texts), device=target.device)
            count = torch.full((len(texts),), len(kept), device=target.device)
            verifier.keep(rows, Accepted(path, path, count))
    return _largest_error(target, found)


def _trees(tokens: Sequence[Sequence[int]], parents: Sequence[int], device: torch.device) -> Trees:
    """The same tree for every sequence, of these tokens."""
    levels = [len(path) - 1 for path in _paths(parents)]
    parent = torch.tensor([list(parents)] * len(tokens), device=device)
    level = torch.tensor([levels] * len(tokens), device=device)
    return Trees(torch.tensor(tokens, device=device), parent, level, ancestors_of(parent, max(levels)))


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the root to each node."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    return paths


def _compared(parents: Sequence[int]) -> list[list[int]]:
    """The paths to all nodes down to the deepest, and to the first leaf: every other one would cost a reference."""
    paths = _paths(parents)
    deepest = max(paths, key=len)
    first_leaf = next(path for path in paths if path[-1] not in parents or len(parents) == 1)
    return [path for path in paths if path[-1] in {*deepest, *first_leaf}]


def _padded(target: Target, texts: Sequence[Sequence[int]]) -> Tensor:
    rows = [torch.tensor(text, device=target.device) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _largest_error(target: Target, found: Sequence[tuple[list[int], Tensor]]) -> float:
    """Against one plain forward of all texts, filled up behind their ends."""
    texts = [text for text, _ in found]
    whole = [
        text for text in texts if not any(len(other) > len(text) and other[: len(text)] == text for other in texts)
    ]
    expected = target.forward(_padded(target, whole), taps=False).last_hidden
    errors = []
    for text, state in found:
        row = next(index for index, other in enumerate(whole) if other[: len(text)] == text)
        errors.append(relative_error(state, expected[row, len(text) - 1]))
    return max(errors)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of vectors; infinite where there is a NaN."""
    found, expected = found.float(), expected.float()
    error = ((found - expected).norm() / expected.norm()).item()
    return math.inf if math.isnan(error) else error


def random_tokens(target: Target, seed: int) -> Callable[[int], list[int]]:
    """Draws ordinary tokens: from the middle of the vocabulary, none that the config names (pictures, padding)."""
    named = {
        value for config in (target.config, target.text_config) for key, value in vars(config).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }  # fmt: skip
    ids = [token for token in range(target.vocab_size // 4, 3 * target.vocab_size // 4) if token not in named]
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return [ids[index] for index in torch.randint(len(ids), (count,), generator=generator).tolist()]

    return draw


# -- beyond the positions of the first training ------------------------------------------------------------------------


def _rope_limit(target: Target) -> int | None:
    """The length past which the rope of all tokens is another: what the config says of a longrope, else measured.

    Where the config names the positions of a first training, the token past them is read behind cached ones; a plain
    forward of all of them differs where the cached keys are those of another rope.
    """
    rope = getattr(target.text_config, "rope_parameters", None)
    known, suspect = longrope_limit(rope), _original_positions(target.text_config)
    if known is not None or suspect is None or suspect <= PROMPT or keeps_running_state(target):
        return known
    error = least_error(partial(crossing_error, target, suspect), _tolerance(target))
    return None if error <= _tolerance(target) else suspect


def _original_positions(text_config: Any) -> int | None:
    rope = getattr(text_config, "rope_parameters", None) or {}
    layers = [rope, *(row for row in rope.values() if isinstance(row, dict))]
    return next((int(row[key]) for row in layers if row.get(key := "original_max_position_embeddings")), None)


def crossing_error(target: Target, limit: int, seed: int) -> float:
    """A token at the first position past `limit`, cached ones before it, against all of them at once."""
    cache: Any = DynamicCache(config=target.text_config)
    ids = torch.tensor([random_tokens(target, seed)(PROMPT + 1)], device=target.device)
    positions = torch.arange(limit - PROMPT, limit + 1, device=target.device)[None]
    before, behind = slice(None, PROMPT), slice(PROMPT, None)
    target.forward(ids[:, before], position_ids=positions[:, before], past_key_values=cache, taps=False)
    found = target.forward(ids[:, behind], position_ids=positions[:, behind], past_key_values=cache, taps=False)
    expected = target.forward(ids, position_ids=positions, taps=False)
    return relative_error(found.last_hidden[0, -1], expected.last_hidden[0, -1])
