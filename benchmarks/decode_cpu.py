"""Plain decoding beside `model.generate` (dynamic and static cache), interleaved, and the target's time for n tokens.

    python benchmarks/decode_cpu.py MODEL [--dtype float32 bfloat16] [--repeats 5] [--threads 2] [--cpu-time]

Same prompts, same process, greedy, no EOS; medians over repeats. V(n) is the target's forward of n tree tokens, head
included, behind a prefix: what a round of speculative decoding pays. --cpu-time counts the process's own seconds: on a
machine that others use, with --threads 1, it is the steadier clock.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fledge.decoding.costs import verify_time
from fledge.decoding.generate import Sampling, generate
from fledge.target.model import Target

PROMPTS = ("Write a short story about a lighthouse keeper who finds a letter in a bottle.",)
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        print(json.dumps({dtype: measure(options, dtype)}, indent=1), flush=True)


def measure(options: argparse.Namespace, dtype: str) -> dict:
    """Tokens per second of every way to decode, and V(n) in milliseconds."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    new_tokens = options.new_tokens
    target = Target.from_pretrained(options.model, dtype=getattr(torch, dtype), device="cpu")
    prompts = [target.tokenizer(text)["input_ids"] for text in PROMPTS]
    ways: dict[str, Callable[[list[int]], list[int]]] = {
        "plain": lambda ids: (
            generate(target, None, ids, max_new_tokens=new_tokens, sampling=Sampling(), eos_token_ids=()).token_ids
        ),
        "generate, dynamic cache": lambda ids: library(target, ids, new_tokens),
        "generate, static cache": lambda ids: library(target, ids, new_tokens, cache_implementation="static"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outputs: dict[str, list[list[int]]] = {way: [] for way in ways}
    for repeat in range(-1, options.repeats):  # the first pass warms up
        for ids in prompts:
            for way, decode in ways.items():
                start = clock()
                tokens = decode(ids)
                if repeat >= 0:
                    seconds[way].append(clock() - start)
                    outputs[way].append(tokens)
    speeds = {way: new_tokens / statistics.median(times) for way, times in seconds.items()}
    return {
        "tokens_per_s": {way: round(speed, 2) for way, speed in speeds.items()},
        "plain_over_generate": {
            way: round(statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True)), 3)
            for way, times in seconds.items()
        },
        "same_tokens": {way: outputs[way] == outputs["plain"] for way in ways},
        "verify_ms": {nodes: round(verify_ms(target, prompts[0], nodes), 2) for nodes in NODES},
    }


@torch.inference_mode()
def library(target: Target, ids: list[int], new_tokens: int, **options: str) -> list[int]:
    """The same tokens through transformers."""
    prompt = torch.tensor([ids])
    output = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, eos_token_id=None, disable_compile=True, **options,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


def verify_ms(target: Target, ids: list[int], nodes: int, prefix_len: int = 256) -> float:
    """V(n): one tree of `nodes` tokens behind a prefix of 256, head included."""
    return 1000 * verify_time(target, (ids * prefix_len)[:prefix_len], nodes)


if __name__ == "__main__":
    main()
