"""Decoding at the shapes of a real target with random weights: time needs no trained model.

    python benchmarks/decode_shapes.py --shape qwen3-8b --device cuda [--out benchmarks/decode_qwen3-8b_h200_yyyymm]

Reported for exact shapes and fixed ones (captured into CUDA graphs on a GPU): plain tokens per second and the
share of the memory's measured read speed it reaches; rounds of several trees with a random head: draft, verify, accept
in milliseconds, and the round over the time of reading the weights of its passes once. Fixed shapes also with
several prompts at once. Beside them V(n), the time for n tree nodes. A random head's tokens are
refused, so a round emits one token; acceptance changes how many tokens a round brings, not what it costs. Medians. Keep
--new-tokens well above the trees' depth: near the limit exact shapes draft shallower trees.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fledge import provenance
from fledge.commands.answering import read_speed
from fledge.decoding.costs import verify_time
from fledge.decoding.generate import generate_batch
from fledge.decoding.records import Generation, Sampling
from fledge.decoding.tune import NODES
from fledge.drafters.eagle3.config import derive
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from make import full_config  # noqa: E402
from targets import TARGETS  # noqa: E402

TREES = (TreeShape(60, 5, 10), TreeShape(16, 3, 4), TreeShape(6, 4, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(TARGETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the target has, to try the script")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the answer")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="prompts at once, in fixed shapes")
    parser.add_argument("--out", type=Path, help="without suffix; a .json is written")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.out:
        provenance.write_json(options.out.with_suffix(".json"), {**result, **provenance.collect(vars(options))})


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    target, draft = random_pair(options)
    prompt = torch.randint(10, 1000, (options.prompt,)).tolist()
    weights, head = size_of(target.model), size_of(draft)
    fastest = read_speed(target.device)
    ways = {"exact": ("exact", 1), **{f"fixed, {batch} at once": ("fixed", batch) for batch in options.batches}}
    figures: dict[str, Any] = {}
    for way, (shapes, batch) in ways.items():
        plain = repeated(target, None, TREES[0], prompt, shapes, batch, options)
        per_token = statistics.median(one.decode_s / one.num_forwards for one in plain)
        figures[way] = {
            "tok_per_s": batch / per_token, "share_of_read_speed": weights / per_token / fastest, "rounds": {},
        }  # fmt: skip
        for tree in TREES:
            made = repeated(target, draft, tree, prompt, shapes, batch, options)
            name = f"{tree.total_token}/{tree.depth}/{tree.top_k}"
            figures[way]["rounds"][name] = round_costs(made, weights, head, tree, fastest)
    nodes = [n for n in (1, *NODES) if n <= 60]
    return {
        "weights_gb": weights / 1e9, "head_gb": head / 1e9, "read_gb_per_s": fastest / 1e9, "shapes": figures,
        "verify_ms": {n: 1e3 * verify_time(target, prompt, n) for n in nodes},
    }  # fmt: skip


def repeated(
    target: Target, draft: DraftModel | None, tree: TreeShape, prompt: list[int], shapes: Any, batch: int,
    options: argparse.Namespace, sampling: Sampling | None = None,
) -> list[Generation]:  # fmt: skip
    """The first answer of every repeat, after one whole generation unmeasured, in which all buckets are captured."""
    made = [
        generate_batch(
            target, draft, [prompt] * batch, tree=tree, max_new_tokens=options.new_tokens,
            sampling=sampling or Sampling(), eos_token_ids=(), shapes=shapes,
        )[0]
        for _ in range(options.repeats + 1)
    ]  # fmt: skip
    return made[1:]


def round_costs(made: list[Generation], weights: int, head: int, tree: TreeShape, fastest: float) -> dict[str, float]:
    """Milliseconds of a round by phase, and over the time of streaming the weights its passes read."""
    phases = {
        phase: 1e3 * statistics.median(one.phases_s[phase] / one.num_forwards for one in made)
        for phase in ("draft", "verify", "accept", "other")
    }
    streaming_ms = 1e3 * (weights + tree.levels * head) / fastest
    return {**phases, "round": sum(phases.values()), "over_streaming": sum(phases.values()) / streaming_ms}


def random_pair(options: argparse.Namespace) -> tuple[Target, DraftModel]:
    """A target of this shape and a head for it, both random."""
    from transformers import AutoModelForCausalLM

    row = TARGETS[options.shape]
    config = full_config(row).get_text_config()
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    if options.layers and getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: options.layers]
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    target = Target(model.eval(), name=options.shape)
    draft_config = derive(config, vocab_size=target.vocab_size, tap_layers=target.tap_layers, draft_vocab_size=32000)
    draft = DraftModel(draft_config, target.embedding_weight)
    order = torch.arange(draft_config.draft_vocab_size)
    draft.set_vocab(torch.zeros_like(order), torch.arange(target.vocab_size) < len(order))
    return target, draft.to(target.device, target.dtype).eval()


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


if __name__ == "__main__":
    main()
