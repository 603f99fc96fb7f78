"""One optimisation step of a draft head (forward, backward, AdamW): tokens per second, memory, share of peak.

    python benchmarks/train_step.py --shape smollm2 --sequence 512 --steps 3
    python benchmarks/train_step.py --shape qwen3-8b --sequence 2048 --device cuda --peak-tflops 790

The target's states are random: training does not look at them otherwise. All rows are supervised, batch 1, TTT 7. On
CUDA the TTT attention is first compared with its dense twin, values and gradients.
"""

import argparse
import json
import resource
import statistics
import time

import torch

from fledge.draft.batch import Batch, pack
from fledge.draft.config import DraftConfig
from fledge.draft.loss import LossSettings
from fledge.draft.model import DraftModel
from fledge.draft.ttt_attention import Run, dense_ttt_attention, ttt_attention
from fledge.provenance import hardware, versions
from fledge.target.record import TargetRecord
from fledge.train.module import TTTModule

# hidden, intermediate, heads, kv heads, head_dim, vocabulary, draft vocabulary
SHAPES = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, 8192),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 32000),
    "tiny": (64, 96, 4, 2, 16, 512, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--sequence", type=int, default=512, help="tokens per step")
    parser.add_argument("--ttt-steps", type=int, default=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one that is not; the median counts")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of peak")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        compare_attention(device)
    seconds, memory, flops = measure(args, device)
    result = {
        "shape": args.shape, "sequence": args.sequence, "ttt_steps": args.ttt_steps, "dtype": args.dtype,
        "device": args.device, "step_s": seconds, "tokens_per_s": args.sequence / seconds,
        "peak_memory_mib": memory / 2**20, "tflops": flops / seconds / 1e12,
        "share_of_peak": flops / seconds / 1e12 / args.peak_tflops if args.peak_tflops else None,
        "versions": versions(), "hardware": hardware(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


def measure(args: argparse.Namespace, device: torch.device) -> tuple[float, int, float]:
    """Median seconds of a step, peak memory in bytes, multiply-add work of a step in FLOP."""
    module, batch = make(args, device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = module(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    on_cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(times[1:]), memory, work(module, args)


def make(args: argparse.Namespace, device: torch.device) -> tuple[TTTModule, Batch]:
    """A fresh draft and one document of random states."""
    size, inner, heads, kv_heads, head_dim, vocab, draft_vocab = SHAPES[args.shape]
    config = DraftConfig(
        hidden_size=size, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, vocab_size=vocab, draft_vocab_size=draft_vocab, tap_layers=(2, 15, 27),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    table = (torch.randn(vocab, size) * 0.1).to(device, dtype)
    draft = DraftModel(config, table)
    ids = torch.randperm(vocab)[:draft_vocab].sort().values
    draft.set_vocab(ids - torch.arange(draft_vocab), torch.isin(torch.arange(vocab), ids))
    record = TargetRecord(
        sample_id="random", input_ids=torch.randint(vocab, (args.sequence,)),
        loss_mask=torch.ones(args.sequence) > 0, position_ids=torch.arange(args.sequence),
        tap_hidden=torch.randn(args.sequence, 3, size).to(dtype),
        last_hidden=torch.randn(args.sequence, size).to(dtype),
    )  # fmt: skip
    module = TTTModule(draft.to(device), lambda hidden: hidden @ table.T, args.ttt_steps, LossSettings())
    return module, pack([record]).to(device)


def work(module: TTTModule, args: argparse.Namespace) -> float:
    """Matrix products of a step: 6 FLOP per weight, row and TTT step (fc only at step 0), 2 per teacher weight."""
    draft = module.draft
    layer = sum(p.numel() for p in draft.midlayer.parameters() if p.dim() == 2) + draft.lm_head.weight.numel()
    teacher = 2 * draft.embedding.numel()
    return args.sequence * (6 * args.ttt_steps * layer + 6 * draft.fc.weight.numel() + teacher)


def compare_attention(device: torch.device) -> None:
    """The flash kernels of this device against the dense twin, in bf16 against fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(200, 8, 64), (300, 2, 64), (300, 2, 64), *[(200, 2, 64)] * 4]
    exact = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    runs = (Run(0, 0, 80), Run(100, 180, 300))

    def grads(attend, leaves):
        q, k, v, *own = leaves
        out = attend(q, k, v, own[:2], own[2:], runs)
        return [out, *torch.autograd.grad(out.float().pow(2).sum(), leaves)]

    for found, wanted in zip(grads(ttt_attention, rough), grads(dense_cpu, exact), strict=True):
        error = ((found.float() - wanted).norm() / wanted.norm()).item()
        assert error < 2e-2, f"TTT attention on {device}: relative error {error:.1e}"
    print(f"TTT attention on {device} equals its dense twin")


def dense_cpu(q, k, v, later_k, later_v, runs):
    with torch.device(q.device):
        return dense_ttt_attention(q, k, v, later_k, later_v, runs)


if __name__ == "__main__":
    main()
