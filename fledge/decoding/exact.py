"""Whether drafts leave the text of a target as it is, bit for bit.

A verified token is the target's own choice. It is the token that plain decoding gives if the logits are: then the text
is the same with and without drafts, in trees and chains, alone and in a batch, at every temperature with one seed. In
exact arithmetic logits are. In bf16 they differ in the last bits where a sum is taken in another order, and of two
tokens that are nearly tied the other one is chosen: measured, in four of ten answers of 48 tokens. `attention.py`
takes the sums of attention in one order; on a CPU, products of matrices, norms and experts may be the library's, on a
GPU all must be our kernels, of which one cuts any number of rows alike. A self-test compares bits: a few random tokens
one by one, as a chain, and in the trees of a batch.
"""

import weakref

import msgspec
import torch
from torch import Tensor

from fledge import provenance
from fledge.console import say
from fledge.decoding.accept import one_node
from fledge.decoding.attention import can_be_exact
from fledge.decoding.probe import ability_of, random_tokens
from fledge.decoding.running_state import RunningStateVerifier
from fledge.decoding.verifier import AttentionVerifier, Lengths, Verifier
from fledge.drafters.tree import Trees, ancestors_of, chains
from fledge.outputs import cached
from fledge.target import card, gpu_exact, native
from fledge.target.fused import fused_layers, sums_alone
from fledge.target.model import Target
from fledge.target.products import accelerate, is_independent, is_packed

ENGINE = 3  # one more when the engine computes in another way, and findings that are kept no longer hold
HALF = (torch.bfloat16, torch.float16)
LEVELS = 5  # of the self-test
WIDTH = 8  # nodes of every level but the root's
LENGTH = 44  # of its prompt; longer on a GPU

_wanted: "weakref.WeakKeyDictionary[Target, bool]" = weakref.WeakKeyDictionary()  # True: at any cost
_found: "weakref.WeakKeyDictionary[Target, str]" = weakref.WeakKeyDictionary()  # what is in the way; "" for nothing
_free: "weakref.WeakKeyDictionary[Target, bool]" = weakref.WeakKeyDictionary()


class Obstacle(msgspec.Struct, frozen=True):
    """What the self-test found to be in the way, kept in the user's cache folder."""

    reason: str  # "" for nothing


def want_exact(target: Target, asked: bool) -> None:
    """Decode this target so that its text depends neither on drafts nor on company: where that costs nothing, or,
    `asked`, at any cost."""
    if asked and not _wanted.get(target):
        _found.pop(target, None)
    _wanted[target] = asked


def is_exact(target: Target) -> bool:
    """Whether it is decoded so: it is wanted, and the self-test agrees. Tells those who asked why not, once."""
    asked = _wanted.get(target)
    if asked is None or not (asked or costs_nothing(target)):
        return False
    if target not in _found:
        kept = cached("exact", key_of(target), Obstacle, lambda: Obstacle(obstacle_to_bits(target) or ""))
        _found[target] = kept.reason
        if asked and _found[target]:
            say(f"{target.name}: drafts may change a token where two are nearly tied, because {_found[target]}.")
    return not _found[target]


def costs_nothing(target: Target) -> bool:
    """On a CPU, where all products and the attention are compiled loops: those have one order anyhow."""
    if target.device.type != "cpu":
        return False
    if target not in _free:
        accelerate(target.model)
        layers = fused_layers(target.model, target.layers)
        alone = sums_alone(target.model, layers, target.num_layers)
        alone = alone and not any(layer.size % native.LANES for layer in layers)
        _free[target] = alone and native.attention_is_faster() and ability_of(target).own_cache
    return _free[target]


def key_of(target: Target) -> str:
    """What the bits depend on: machine, library, kernels and shapes."""
    accelerate(target.model)
    linear = [module for module in target.model.modules() if isinstance(module, torch.nn.Linear)]
    packed, alone = sum(map(is_packed, linear)), sum(map(is_independent, linear))
    kernels = f"{packed} of {len(linear)} packed, {alone} by loops, compiled {native.fingerprint()}, engine {ENGINE}"
    if target.device.type == "cuda" and card.runs_on(target.device):
        kernels += f", Triton {card.found().triton.__version__}, {torch.cuda.get_device_name(target.device)}"
    return f"{provenance.costs_key(target.model)}, {target.dtype}, {target.device.type}, {kernels}"


def verifier_of(target: Target, batch: int, capacity: int) -> Verifier:
    """The verifier that this target needs, with room for sequences of `capacity` rows."""
    accelerate(target.model)
    if not ability_of(target).own_cache:
        return RunningStateVerifier(target, batch)
    return AttentionVerifier(target, batch, capacity, exact=is_exact(target))


@torch.inference_mode()
def obstacle_to_bits(target: Target) -> str | None:
    """Why a row's bits depend on what is computed beside it; None where they do not."""
    accelerate(target.model)
    ability = ability_of(target)
    if not ability.own_cache:
        return ability.reason
    if not can_be_exact(target.model):
        return "its attention is its own, where the order of sums cannot be chosen"
    if target.device.type != "cpu" or card.runs_on(target.device):
        reason = obstacle_on_a_card(target)
        if reason is not None:
            return reason
    try:
        different = differing_nodes(target)
    except Exception as crash:  # models are written for the library's own attention functions, and fail in any way
        return f"its attention cannot sum in one order ({type(crash).__name__}: {str(crash)[:120]})"
    if different:
        return f"the logits of {different} of {2 * LEVELS} tokens are other bits in a chain or a tree than alone"
    return None


def obstacle_on_a_card(target: Target) -> str | None:
    """Why not all of its sums are our kernels'."""
    if not card.runs_on(target.device):
        return f"the kernels that sum in one order do not run on {target.device}"
    if target.dtype not in HALF:
        return "on a GPU products in float32 are the library's, whose sums depend on the number of rows"
    if not sums_alone(target.model, fused_layers(target.model, target.layers), target.num_layers):
        return "some of its layers are not built like Llama's, so their products on a GPU are the library's"
    return None


def differing_nodes(target: Target, *, exact: bool = True) -> int:
    """Of a path's nodes, in a chain and in the trees of a batch, those whose logits are not those of plain decoding."""
    draw = random_tokens(target, 0)
    length = gpu_exact.PART - LEVELS // 2 if card.runs_on(target.device) else LENGTH  # into the next part
    text, other, path = draw(length), draw(length * 4 // 7), draw(LEVELS)
    alone = AttentionVerifier(target, 1, length + LEVELS, exact=exact)
    device = target.device
    with alone.running():
        alone.prefill(slice(0, 1), torch.tensor([text], device=device), taps=False)
        in_a_chain = _logits(alone, chains(torch.tensor([path], device=device)), [length])[0]
        steps = []
        for step, token in enumerate(path):  # over the rows of the chain, of which nothing was kept
            steps.append(_logits(alone, chains(torch.tensor([[token]], device=device)), [length + step])[0])
            alone.keep(_known([length + step], device), one_node(device))
    tree, nodes = _tree_around(path, draw((LEVELS - 1) * WIDTH), device)
    company = AttentionVerifier(target, 2, length + tree.num_nodes, exact=exact)
    with company.running():
        for slot, prompt in enumerate((other, text)):
            company.prefill(slice(slot, slot + 1), torch.tensor([prompt], device=device), taps=False)
        in_a_tree = _logits(company, tree, [len(other), len(text)])[1, nodes]
    plain = torch.cat(steps)
    return sum(not torch.equal(*rows) for found in (in_a_chain, in_a_tree) for rows in zip(found, plain, strict=True))


def _logits(verifier: AttentionVerifier, trees: Trees, lengths: list[int]) -> Tensor:
    num_keys = max(lengths) + trees.num_nodes
    output = verifier.verify(trees, _known(lengths, trees.parents.device), num_keys, taps=False)
    return verifier.head(output.last_hidden)


def _known(lengths: list[int], device: torch.device) -> Lengths:
    return Lengths(torch.tensor(lengths, device=device), tuple(lengths))


def _tree_around(path: list[int], strangers: list[int], device: torch.device) -> tuple[Trees, list[int]]:
    """A tree for two sequences in which every node of the path has siblings on both sides; and the path's nodes."""
    tokens, parents, levels, nodes = [path[0]], [0], [0], [0]
    for level in range(1, len(path)):
        first = len(tokens)
        tokens += strangers[(level - 1) * WIDTH : level * WIDTH]
        parents += [nodes[-1]] * WIDTH
        levels += [level] * WIDTH
        nodes.append(first + WIDTH // 2)
        tokens[nodes[-1]] = path[level]
    token_ids, parent_of, level_of = (
        torch.tensor([row, row], device=device) for row in (tokens, parents, levels)
    )  # fmt: skip
    return Trees(token_ids, parent_of, level_of, ancestors_of(parent_of, len(path) - 1)), nodes
