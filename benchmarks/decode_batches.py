"""Fixed shapes beside exact ones, one prompt and several at once: tokens per second of all prompts together.

    python benchmarks/decode_batches.py MODEL HEAD [--dtype float32] [--tree 8 2 3] [--batches 1 4] [--threads 2]

Same prompts, same process, greedy, no EOS, in turns; the best of the repeats, prefill left out. Outputs of both are
compared: in float32 they must agree.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fledge.decoding.generate import generate_batch
from fledge.decoding.records import Generation, Sampling
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.config import from_json
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What is the capital of France?",
    "Explain step by step how to boil an egg, for a child who has never cooked.",
    "List five fruits that grow in cold countries.",
)
POLICIES: tuple[Any, ...] = ("exact", "fixed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("head", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tree", type=int, nargs=3, default=[8, 2, 3], metavar=("NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options), indent=1))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by way, and whether the two agree."""
    taps = from_json(options.head / "config.json").tap_layers
    dtype = getattr(torch, options.dtype)
    target = Target.from_pretrained(options.model, dtype=dtype, device=options.device, tap_layers=taps)
    draft = load_draft(options.head, target.embedding_weight)
    prompts = [
        target.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in PROMPTS
    ]
    figures: dict[str, Any] = {}
    for batch in options.batches:
        asked = [prompts[index % len(prompts)] for index in range(batch)]
        for name, head in (("plain", None), ("speculative", draft)):
            best: dict[str, tuple[float, list[Generation]]] = {}
            for repeat in range(-1, options.repeats):  # the first pass warms up
                for shapes in POLICIES:
                    made = generate_batch(
                        target, head, asked, tree=TreeShape(*options.tree), sampling=Sampling(), eos_token_ids=(),
                        max_new_tokens=options.new_tokens if repeat >= 0 else 8, shapes=shapes,
                    )  # fmt: skip
                    if repeat >= 0:
                        best[shapes] = max(best.get(shapes, (0.0, made)), (speed(made), made), key=first)
            tokens = [[one.token_ids for one in made] for _, made in best.values()]
            figures[f"{name}, {batch} at once"] = {
                **{shapes: round(value, 1) for shapes, (value, _) in best.items()},
                "same_tokens": tokens[0] == tokens[1],
                "round_ms": {shapes: round_ms(made[0]) for shapes, (_, made) in best.items()},
            }  # fmt: skip
    return figures


def first(pair: tuple[float, Any]) -> float:
    return pair[0]


def speed(made: list[Generation]) -> float:
    """Tokens per second of all, which share their time."""
    return sum(len(one.token_ids) - 1 for one in made) / max(one.decode_s for one in made)


def round_ms(one: Generation) -> dict[str, float]:
    """Milliseconds of a round by phase."""
    parts = {name: 1e3 * seconds / one.num_forwards for name, seconds in one.phases_s.items() if name != "prefill"}
    return {name: round(value, 2) for name, value in parts.items()}


if __name__ == "__main__":
    main()
