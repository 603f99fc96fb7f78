"""Sections of on_gpu.py: decoding, its parts, and whether its answers are right."""

import argparse
import functools
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import decode_shapes
import torch
import torch.nn.functional as F
from gpu_bench import Bench, LeftOut, figure, graph_ms, kernels, section, tiny_module

from fledge.decoding.capture import Timer
from fledge.decoding.exact import obstacle_to_bits, want_exact
from fledge.decoding.generate import Sampling, TreeShape, drop_sessions, generate_batch
from fledge.drafters.eagle3.model import DraftModel
from fledge.target import gpu_products
from fledge.target.model import Target

NAMES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "hunyuan_v1_dense")
TREES = {"60/5/10": TreeShape(60, 5, 10), "16/3/4": TreeShape(16, 3, 4), "6/4/1": TreeShape(6, 4, 1)}
TAU = 3.5  # of a trained head, for tokens per second from the time of a round


@section(15)
def device(bench: Bench) -> dict[str, Any]:
    """The card's memory and matrix units: the ceilings of everything below."""
    found: dict[str, Any] = {"copy_tb_per_s": bench.bytes_per_s / 1e12, "bf16_tflops": bench.flops / 1e12}
    if bench.on_gpu:
        found |= {"cudnn": torch.backends.cudnn.version(), "memory_gib": torch.cuda.mem_get_info()[1] / 2**30}
    return found


@section(60)
def captured(bench: Bench) -> dict[str, Any]:
    """Captured rounds beside eager ones, token for token, for eight architectures; a seed repeats its text."""
    tiny, refused = tiny_module(), {}
    for name in NAMES[:2] if bench.small else NAMES:
        dtype = torch.bfloat16 if name in ("gpt_oss", "qwen3_moe") and bench.on_gpu else torch.float32
        target = Target(tiny.tiny_model(name).to(bench.device, dtype), tap_layers=(1, 2, 3), name=name)
        draft = tiny.tiny_draft(target).to(bench.device, dtype)
        prompts = [tiny.prompt(length) for length in (20, 1, 5)]
        for drafter, law in itertools.product((draft, None), (Sampling(), Sampling(0.8, 0.9, seed=5))):
            options: Any = {
                "tree": TreeShape(20, 3, 4), "max_new_tokens": 12 if bench.small else 30, "sampling": law,
                "eos_token_ids": (),
            }  # fmt: skip
            fixed, again, exact = (
                [one.token_ids for one in generate_batch(target, drafter, prompts, shapes=shapes, **options)]
                for shapes in ("fixed", "fixed", "exact")
            )
            assert fixed == again, f"{name}: the same seed gives another text"
            assert fixed == exact or dtype == torch.bfloat16, f"{name}: captured rounds give another text, {law}"
            refused[name] = refusal(target)
        drop_sessions(target)
    assert not any(refused.values()), f"not captured: {refused}"
    return {"architectures": list(refused)}


def refusal(target: Target) -> str:
    """Why the device would not capture this target's rounds."""
    from fledge.decoding.generate import _sessions

    kept = _sessions.get(target, {}).values()
    return next((one._captured.refused for one in kept if one._captured is not None and one._captured.refused), "")


def streamed_bytes(target: Target) -> int:
    """Weights that a forward reads: the table of embeddings is looked up, not read, unless it is the head, too."""
    table = 0 if target.embedding_weight.data_ptr() == target.head_weight.data_ptr() else target.embedding_weight.nbytes
    return decode_shapes.size_of(target.model) - table


def rounds(
    bench: Bench, drafter: DraftModel | None, tree: TreeShape, batch: int = 1, *, few: bool = False, **more: Any
) -> dict[str, float]:
    """Milliseconds of a round by part, and tokens per second at one token a round."""
    target, _ = bench.pair()

    tokens = 4 if few and bench.small else 16 if few or bench.small else 64
    options = argparse.Namespace(new_tokens=tokens, repeats=1 if few or bench.small else 3)
    length = more.pop("prompt", 20 if bench.small else 512)
    prompt = torch.randint(4, 100, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    made = decode_shapes.repeated(target, drafter, tree, prompt, "fixed", batch, options, **more)
    parts = {
        part: 1e3 * statistics.median(one.phases_s[part] / one.num_forwards for one in made)
        for part in ("draft", "verify", "accept", "other")
    }
    whole = 1e3 * statistics.median(one.decode_s / one.num_forwards for one in made)
    reason = refusal(target)
    return parts | {
        "round": whole, "forwards": sum(one.num_forwards for one in made) * (1 + 1 / len(made)),
        **({"not captured": reason} if reason else {}),
    }  # fmt: skip


@section(45)
def plain(bench: Bench) -> dict[str, Any]:
    """Plain decoding of one sequence, tokens per second."""
    target, _ = bench.pair()
    found = rounds(bench, None, TreeShape())
    speed = figure(
        1e3 / found["round"], bench.bytes_per_s / streamed_bytes(target), "tok/s", goal=170,
        peer="8B bf16 on an H100: 133 to 158",
    )  # fmt: skip
    return {"speed": speed, "ms": found}


@section(75)
def tree_rounds(bench: Bench) -> dict[str, Any]:
    """Rounds of three trees: draft, verify, accept; tokens per second at an acceptance length of 3.5."""
    target, draft = bench.pair()
    found: dict[str, Any] = {}
    for name, tree in TREES.items():
        parts = rounds(bench, draft, tree)
        verify = 1e3 * streamed_bytes(target) / bench.bytes_per_s
        drafting = 1e3 * tree.levels * decode_shapes.size_of(draft) / bench.bytes_per_s
        goals = {"draft": 1.8, "verify": 6.5, "round": 8.5} if name == "60/5/10" else {}
        ceilings = {"draft": drafting, "verify": verify, "round": drafting + verify}
        found[name] = {part: figure(parts[part], ceilings[part], "ms", goal=goals.get(part)) for part in ceilings}
        found[name]["accept_ms"] = parts["accept"]
        found[name]["at tau 3.5"] = figure(
            1e3 * TAU / parts["round"], 1e3 * TAU / (drafting + verify), "tok/s", goal=410 if goals else None,
            peer="SGLang, EAGLE-3 chain, MT-bench, 8B on an H100: 379",
        )  # fmt: skip
    return found


@section(60)
def same_bits(bench: Bench) -> dict[str, Any]:
    """What `--exact` costs: plain steps and rounds without and with it; what is in its way, if anything; and how many
    bf16 texts of a random model equal plain decoding's."""
    target, draft = bench.pair()
    found: dict[str, Any] = {"in the way": obstacle_to_bits(target)}
    cases = {"plain": (None, TreeShape()), "60/5/10": (draft, TREES["60/5/10"]), "6/4/1": (draft, TREES["6/4/1"])}
    prompts = [torch.randint(4, 100, (20,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(4)]
    for asked in (False, True):
        want_exact(target, asked)
        texts = [
            [one.token_ids for one in generate_batch(target, drafter, prompts, tree=tree, max_new_tokens=48,
                                                     eos_token_ids=())]
            for drafter, tree in cases.values()
        ]  # fmt: skip
        found["exact" if asked else "as usual"] = {
            **{name: rounds(bench, *case, few=True) for name, case in cases.items()},
            "equal texts": [sum(map(list.__eq__, one, texts[0])) for one in texts[1:]],
        }
        drop_sessions(target)
    want_exact(target, False)
    return found


@section(40)
def profile(bench: Bench) -> dict[str, Any]:
    """Microseconds of a round by kernel, and launches: plain decoding and the largest tree."""
    _, draft = bench.pair()
    cases = {"plain": (None, TreeShape()), "60/5/10": (draft, TREES["60/5/10"])}
    return {
        name: kernels(bench, functools.partial(rounds, bench, *case, few=True), per="forwards")
        for name, case in cases.items()
    }


@section(30)
def products(bench: Bench) -> dict[str, Any]:
    """Products of few rows in a graph, matrices apart and together, by PyTorch and by whatever is fastest."""
    apart = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (12288, 4096),
             "up": (12288, 4096), "down": (4096, 12288)}  # fmt: skip
    together = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
    layers, found = 2 if bench.small else 6, {}
    for name, shapes in {"apart": apart, "together": together, "head": {"head": (151936, 4096)}}.items():
        shapes = (
            {key: (rows // 64, columns // 64) for key, (rows, columns) in shapes.items()} if bench.small else shapes
        )
        kept = [
            [torch.randn(*shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes.values()]
            for _ in range(1 if name == "head" else layers)
        ]
        least = 1e6 * sum(one.nbytes for one in kept[0]) / bench.bytes_per_s
        for rows in (1, 2, 4, 8, 16, 32, 60, 64, 128):
            inputs = {size: torch.randn(rows, size, device=bench.device, dtype=torch.bfloat16)
                      for size in {one.shape[1] for one in kept[0]}}  # fmt: skip
            for way, linear in {"": F.linear, ", measured": gpu_products.linear}.items():
                us = 1e3 * graph_ms(bench, lambda linear=linear, kept=kept, inputs=inputs: [
                    linear(inputs[one.shape[1]], one) for layer in kept for one in layer
                ]) / len(kept)  # fmt: skip
                found[f"{name}, {rows}{way}"] = {
                    "us": round(us, 1),
                    "ceiling": round(least, 1),
                    "share": round(least / us, 3),
                }
    small = torch.zeros(4096, device=bench.device)
    found["empty kernel"] = {"us": graph_ms(bench, lambda: [small.add_(1) for _ in range(1000)])}
    return found


@section(20)
def attention(bench: Bench) -> dict[str, Any]:
    """Which attention kernel is chosen (0 math, 1 flash, 2 efficient, 3 cuDNN), and what a new length costs."""
    many, few = (200, 40) if bench.small else (2048, 768)
    cases = {  # query heads, key heads, rows, keys, mask, causal
        "verify 60": (8, 8, 240, few, True, False), "plain": (8, 8, 4, few, True, False),
        "draft 10": (8, 8, 40, few, True, False), "prefill": (32, 8, many, many, False, True),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (heads, groups, rows, keys, masked, causal) in cases.items():
        for extra in (0, 1):
            rows = rows if masked else keys + extra
            q = torch.randn(1, heads, rows, 128, device=bench.device, dtype=torch.bfloat16)
            k = torch.randn(1, groups, keys + extra, 128, device=bench.device, dtype=torch.bfloat16)
            mask = torch.zeros(1, 1, rows, keys + extra, device=bench.device, dtype=torch.bfloat16) if masked else None
            more: Any = {"attn_mask": mask, "is_causal": causal, "enable_gqa": heads != groups}
            bench.wait()
            timer = Timer(torch.device("cpu"))
            timer.lap("begin")
            F.scaled_dot_product_attention(q, k, k, **more)
            bench.wait()
            timer.lap("first")
            kind = torch._fused_sdp_choice(q, k, k, **more) if bench.on_gpu else None
            us = 1e3 * bench.ms(lambda q=q, k=k, more=more: F.scaled_dot_product_attention(q, k, k, **more))
            found[f"{name}, {keys + extra} keys"] = {
                "kernel": kind, "first_ms": 1e3 * timer.seconds()["first"], "us": us
            }  # fmt: skip
    return found


@section(90)
def head(bench: Bench) -> dict[str, Any]:
    """A real target with its head (--target, --draft): acceptance length and speed-up by temperature and tree."""
    if bench.target is None or bench.draft is None:
        raise LeftOut("no --target and --draft")
    from fledge.cli import main as fledge

    found = {}
    largest = ["--total-token", "60", "--depth", "5", "--top-k", "10"]
    cases = {"temperature 0": ["0"], "temperature 1": ["1"], "temperature 0, tree 60/5/10": ["0", *largest],
             "temperature 0, exact": ["0", "--exact"]}  # fmt: skip
    questions, tokens = ("1", "8") if bench.small else ("6", "128")
    for name, law in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            words = ["bench", "--target", str(bench.target), "--draft", str(bench.draft), "--bench-name", "quick"]
            more = ["--question-end", questions, "--max-new-tokens", tokens, "--temperature", *law]
            try:
                fledge([*words, *more, "--output-dir", folder, *([] if bench.on_gpu else ["--num-gpus-total", "0"])])
            except SystemExit as end:
                assert not end.code, f"fledge bench ended with {end.code}"
            found[name] = json.loads((Path(folder) / "summary.json").read_text())
    return found


@section(45)
def batch(bench: Bench) -> dict[str, Any]:
    """Four sequences at once: plain, and the largest tree."""
    _, draft = bench.pair()
    return {"plain": rounds(bench, None, TreeShape(), 4), "60/5/10": rounds(bench, draft, TREES["60/5/10"], 4)}


@section(45)
def sampling(bench: Bench) -> dict[str, Any]:
    """A round of the largest tree at temperature 1 with top-p 0.9: what choosing costs."""
    _, draft = bench.pair()
    return rounds(bench, draft, TREES["60/5/10"], sampling=Sampling(1.0, 0.9, seed=1))


@section(60)
def long(bench: Bench) -> dict[str, Any]:
    """Plain decoding and the largest tree behind 8192 tokens."""
    _, draft = bench.pair()
    length = 100 if bench.small else 8192
    return {
        "plain": rounds(bench, None, TreeShape(), prompt=length),
        "60/5/10": rounds(bench, draft, TREES["60/5/10"], prompt=length),
    }
