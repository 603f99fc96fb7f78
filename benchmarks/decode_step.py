"""What a decoding step costs with the stock model's products and small operations, and with ours, in turns.

    python benchmarks/decode_step.py MODEL HEAD [--dtype float32 bfloat16] [--threads 2] [--turns 15] [--cpu-time]

V(n) is the target's forward of n tree tokens behind a prefix, head included; a pass is what one more level of a tree
costs the head. Two copies of both models lie in memory, one without packed weights and compiled operations. Minimum and
median over turns. --cpu-time counts the thread's own seconds: on a machine that others use, with --threads 1, it is the
steadier clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

from fledge.decoding.costs import MAX_LEVELS, emitted_between, tree_proposer
from fledge.decoding.exact import verifier_of
from fledge.decoding.verifier import Lengths
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import Trees, TreeShape, ancestors_of
from fledge.target.model import Target

SIZES = (1, 4, 8, 16)
PREFIX, WIDTH = 256, 4
OURS = {  # what makes the difference, and what stands in for it on the other side
    "fledge.decoding.exact.accelerate": lambda _model: None,
    "fledge.drafters.eagle3.propose.accelerate": lambda _model: None,
    "fledge.decoding.verifier.rms_norms": lambda _model: {},
    "fledge.decoding.verifier.usual_ropes": lambda _model: [],
    "fledge.decoding.verifier.fused_layers": lambda _model, _layers: [],
}

Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| | V(1) | V(4) | V(8) | V(16) | pass | V(8) / V(1) | pass / V(1) |\n|---|---|---|---|---|---|---|---|")
    for dtype in args.dtype:
        with torch.inference_mode():
            with stock():
                sides = {"stock": calls_of(args, dtype)}
            sides["ours"] = calls_of(args, dtype)
            milliseconds = in_turns(sides, args)
        for side in sides:
            print(row(f"{dtype}, {side}", milliseconds[side]), flush=True)


@contextmanager
def stock() -> Iterator[None]:
    """Models that are made ready inside stay as transformers and PyTorch have them."""
    with ExitStack() as stack:
        for name, stand_in in OURS.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield


def calls_of(args: argparse.Namespace, dtype: str) -> Calls:
    """V(n) by n, and trees of one and of all levels, with models of their own."""
    files = read_drafter(str(args.head))
    target = Target.from_pretrained(
        str(args.model), dtype=getattr(torch, dtype), device="cpu", tap_layers=files.tap_layers
    )
    draft = files.bind(target)
    tokens = torch.randint(target.vocab_size, (PREFIX,), generator=torch.Generator().manual_seed(0))
    verifier = verifier_of(target, 1, PREFIX + max(SIZES))
    with verifier.running():
        verifier.prefill(slice(0, 1), tokens[None], taps=False)
    lengths = Lengths(torch.tensor([PREFIX]), (PREFIX,))

    def verify(nodes: int) -> Callable[[], object]:
        levels = torch.arange(nodes)[None].clamp(max=1)
        parents = torch.zeros_like(levels)
        trees = Trees(tokens[None, -1:].repeat(1, nodes), parents, levels, ancestors_of(parents, 1))

        def call() -> object:
            with verifier.running():
                return target.head(verifier.verify(trees, lengths, PREFIX + nodes, taps=nodes > 1).last_hidden)

        return call

    proposer = tree_proposer(draft, TreeShape(96, MAX_LEVELS - 1, WIDTH), PREFIX)
    taps = torch.zeros(PREFIX, len(target.tap_layers), target.hidden_size, dtype=target.dtype)
    proposer.fill(0, tokens, taps, torch.arange(PREFIX))
    emitted, num_keys = emitted_between(tokens, taps, PREFIX - 3, PREFIX - 1), PREFIX - 1 + proposer.rows_ahead

    def propose(levels: int) -> Callable[[], object]:
        def call() -> object:
            proposer.follow(emitted, num_keys)
            return proposer.propose(emitted, levels, num_keys)

        return call

    verifications = {f"V({nodes})": verify(nodes) for nodes in SIZES}
    return {**verifications, "one level": propose(1), "all levels": propose(MAX_LEVELS)}


def in_turns(sides: dict[str, Calls], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every call of every side, turn by turn, after one that is not counted."""
    clock = time.thread_time if args.cpu_time else time.perf_counter
    found: dict[str, dict[str, list[float]]] = {side: {name: [] for name in calls} for side, calls in sides.items()}
    for turn in range(args.turns + 1):
        for side, calls in sides.items():
            for name, call in calls.items():
                start = clock()
                call()
                seconds = clock() - start
                if turn:
                    found[side][name].append(1000 * seconds)
    return found


def row(title: str, found: dict[str, list[float]]) -> str:
    """Minimum / median, and ratios of minima."""
    found = dict(found)
    first, last = found.pop("one level"), found.pop("all levels")
    found["pass"] = [(b - a) / (MAX_LEVELS - 1) for a, b in zip(first, last, strict=True)]
    cells = [f"{min(times):.1f} / {statistics.median(times):.1f}" for times in found.values()]
    least = {name: min(times) for name, times in found.items()}
    ratios = [f"{least[name] / least['V(1)']:.2f}" for name in ("V(8)", "pass")]
    return f"| {title} | {' | '.join(cells)} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    main()
