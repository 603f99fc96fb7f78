"""One trainer in a process of its own: seconds per optimisation step and memory growth, as one line of JSON.

    python benchmarks/train_step_worker.py fledge --documents documents.json --dtype float32 --steps 3

Run by train_step.py with the Python of the trainer's own environment, so the top of this file needs torch alone. The
target's states, its head and all weights are random: the time of a step does not depend on them. A step is forward,
backward, clipping and AdamW over all documents, each trainer with its own code for all four:

- fledge         documents packed into one row; as in every store, the argmax and logsumexp of the target's logits come
                 with the states, so that a step multiplies the draft vocabulary's rows of the target's head only;
- fledge-depths  the same with rows unrolled to depths drawn at random (--depth_survival 0.8, as by default): 3.95 of
                 the 7 TTT steps of `fledge`;
- specforge      one document after the other, gradients added up, as its batch size of 1 does; sdpa attention; the
                 Triton loss replaced by the package's own eager reference, since Triton needs a GPU;
- specforge-compact  the same with its `compact_teacher` option, which spares memory;
- speculators    documents packed into one row with document ids; sdpa attention; its eager loss. Its head is frozen, as
                 it always is there: it multiplies and steps less than the others.
"""

import argparse
import functools
import importlib
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# hidden, intermediate, heads, kv heads, head_dim, vocabulary, draft vocabulary
SHAPES = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, 8192),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 32000),
    "tiny": (64, 96, 4, 2, 16, 512, 128),
}
RATE = 1e-4
SURVIVAL = 0.8
COVERED_SCALE = (
    2.0  # of the draft vocabulary's rows: the target's choice is a draft token nearly always, as in real data
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--documents", type=Path, required=True, help='JSON: [{"ids": [...], "mask": [...]}, ...]')
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ttt-steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps after one that is not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = TRAINERS[args.trainer](args, documents(args))
    print(json.dumps({**run(step, args), "flop_per_token": flop_per_token(args)}))


def run(step: Callable[[], float | torch.Tensor], args: argparse.Namespace) -> dict:
    """Take the steps; memory is the peak above what stood there before the first one."""
    importlib.import_module("torch._dynamo")  # an optimizer's first step would, and its 100 MiB are nobody's growth
    device = torch.device(args.device)
    start = memory(device, reset=True)
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(args.steps + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        losses.append(step())
        losses[-1] = float(losses[-1])  # on a GPU this is what waits
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    grown = memory(device) - start
    assert all(loss == loss for loss in losses), f"{losses=}"
    return {
        "first_s": seconds[0], "seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "losses": losses,
        "start_mib": start / 2**20, "growth_mib": grown / 2**20,
    }  # fmt: skip


def memory(device: torch.device, *, reset: bool = False) -> int:
    """Peak bytes since the last reset; with reset, bytes now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return _status("VmRSS")
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def documents(args: argparse.Namespace, num_taps: int = 3) -> list[dict[str, torch.Tensor]]:
    """Token ids and masks from the file, states at random."""
    size, dtype = SHAPES[args.shape][0], getattr(torch, args.dtype)
    made = []
    for document in json.loads(args.documents.read_text()):
        ids = torch.tensor(document["ids"])
        made.append({
            "ids": ids, "mask": torch.tensor(document["mask"], dtype=torch.bool),
            "taps": torch.randn(len(ids), num_taps, size).to(dtype), "last": torch.randn(len(ids), size).to(dtype),
        })  # fmt: skip
    return made


def head_and_vocab(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The target's head (V, H), t2d and d2t."""
    size, *_, vocab, draft_vocab = SHAPES[args.shape]
    table = torch.randn(vocab, size) * 0.1
    ids = torch.randperm(vocab)[:draft_vocab].sort().values
    table[ids] *= COVERED_SCALE
    table = table.to(getattr(torch, args.dtype))
    return table, torch.isin(torch.arange(vocab), ids), ids - torch.arange(draft_vocab)


# -- the trainers ------------------------------------------------------------------------------------------------------


def fledge(
    args: argparse.Namespace, docs: list[dict[str, torch.Tensor]],
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda module: module,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    """The module and the optimizer of `fledge train`; `wrap` makes the module one of several ranks."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fledge.drafters.batch import pack
    from fledge.drafters.cpu_kernels import filled_up
    from fledge.drafters.eagle3.config import DraftConfig
    from fledge.drafters.eagle3.model import DraftModel
    from fledge.drafters.loss import LossSettings
    from fledge.target.head import TargetHead
    from fledge.target.quirks import LogitQuirks
    from fledge.target.record import TargetRecord, TeacherSummary
    from fledge.train.module import TTTModule

    size, inner, heads, kv_heads, head_dim, vocab, draft_vocab = SHAPES[args.shape]
    config = DraftConfig(
        hidden_size=size, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, vocab_size=vocab, draft_vocab_size=draft_vocab, tap_layers=(2, 15, 27),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    device = torch.device(args.device)
    table, t2d, d2t = head_and_vocab(args)
    table = table.to(device)
    draft = DraftModel(config, table)
    draft.set_vocab(d2t, t2d)
    head = TargetHead(embedding=table, weight=table, bias=None, quirks=LogitQuirks(), keys=("lm_head.weight",))
    records = [
        TargetRecord(sample_id=str(number), input_ids=doc["ids"], loss_mask=doc["mask"],
                     position_ids=torch.arange(len(doc["ids"])), tap_hidden=doc["taps"], last_hidden=doc["last"],
                     summary=TeacherSummary.of(head, doc["last"].to(device), doc["mask"]))
        for number, doc in enumerate(docs)
    ]  # fmt: skip
    batch = pack([record.to(device) for record in filled_up(records, device)])
    if device.type == "cuda":
        compare_attention(device)
    survival = SURVIVAL if args.trainer == "fledge-depths" else 1.0
    module = wrap(TTTModule(draft.to(device), head, args.ttt_steps, LossSettings(), head.rows, survival=survival))
    numbers = itertools.count()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = module(batch, draw=next(numbers)).loss / len(docs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def flop_per_token(args: argparse.Namespace) -> int:
    """Matrix products of a step for each token: 6 per weight and TTT step (fc: once), 2 per teacher weight
    of the draft vocabulary. Depths at random count what is left of the steps."""
    size, inner, heads, kv_heads, head_dim, vocab, draft_vocab = SHAPES[args.shape]
    attention = 2 * size * (heads + 2 * kv_heads) * head_dim + heads * head_dim * size
    layer = attention + 3 * size * inner + draft_vocab * size
    steps = sum((SURVIVAL if args.trainer == "fledge-depths" else 1.0) ** step for step in range(args.ttt_steps))
    return round(6 * steps * layer) + 6 * 3 * size * size + 2 * draft_vocab * size


def compare_attention(device: torch.device) -> None:
    """The flash kernels of this device, block by block and all documents at once, against the dense twin: in bf16
    against fp32, whole and with a window."""
    from fledge.drafters.eagle3.ttt_attention import dense_ttt_attention, ttt_attention
    from fledge.drafters.runs import Run, query_places

    generator = torch.Generator().manual_seed(0)
    shapes = [(200, 8, 64), (300, 2, 64), (300, 2, 64), *[(200, 2, 64)] * 4]
    exact = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    runs = (Run(0, 0, 80), Run(100, 180, 300))
    rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    at_once = functools.partial(ttt_attention, places=query_places(rows, (100, 200), device))

    def grads(attend: Callable, leaves: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
        q, k, v, *own = leaves
        with torch.device(device):
            out = attend(q, k, v, own[:2], own[2:], runs, window)
        return [out, *torch.autograd.grad(out.float().pow(2).sum(), leaves)]

    for attend, window in itertools.product((ttt_attention, at_once), (None, 48)):
        pairs = zip(grads(attend, rough, window), grads(dense_ttt_attention, exact, window), strict=True)
        for found, wanted in pairs:
            error = ((found.float() - wanted).norm() / wanted.norm()).item()
            assert error < 2e-2, f"TTT attention on {device}, window {window}: relative error {error:.1e}"


def llama(args: argparse.Namespace) -> dict:
    """The draft layer as the keywords of a LlamaConfig."""
    size, inner, heads, kv_heads, head_dim, vocab, _ = SHAPES[args.shape]
    return {
        "hidden_size": size, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "num_hidden_layers": 1, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def specforge(args: argparse.Namespace, docs: list[dict[str, torch.Tensor]]) -> Callable[[], float]:
    """SpecForge's strategy, model and optimizer around one batch per document."""
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.core import loss as losses
    from specforge.modeling.draft import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    eagle3.LogSoftmaxLoss = type("Reference", (), {"apply": staticmethod(losses._compute_loss)})
    dtype, low = getattr(torch, args.dtype), args.dtype == "bfloat16"
    table, t2d, d2t = head_and_vocab(args)
    config = LlamaConfig(**llama(args), draft_vocab_size=len(d2t), norm_output=True, pretraining_tp=1)  # type: ignore[call-arg]
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa").to(dtype)
    draft.embed_tokens.weight.data.copy_(table)
    draft.t2d.copy_(t2d)
    draft.d2t.copy_(d2t)
    draft.freeze_embedding()
    model = eagle3.OnlineEagle3Model(draft, length=args.ttt_steps, attention_backend="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        head = TargetHead(folder)
    head.fc.weight = torch.nn.Parameter(table, requires_grad=False)
    strategy = Eagle3TrainStrategy(model, target_head=head, compact_teacher=args.trainer == "specforge-compact")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # bf16 trains with fp32 master copies; in fp32 such copies would only cost it memory, so plain AdamW
    optimizer = BF16Optimizer(model, lr=RATE) if low else torch.optim.AdamW(parameters, lr=RATE)
    batches = [
        TrainBatch(["0"], "eagle3", metadata={"target_repr": "hidden_state"}, tensors={
            "input_ids": doc["ids"][None], "attention_mask": torch.ones_like(doc["ids"][None]),
            "loss_mask": doc["mask"][None].long(), "hidden_state": doc["taps"].flatten(1)[None],
            "target": doc["last"][None]})
        for doc in docs
    ]  # fmt: skip

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = strategy.forward_loss(batch).loss / len(batches)
            loss.backward()
            total += loss.item()
        if not low:
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()  # BF16Optimizer clips and clears the gradients itself
        if not low:
            optimizer.zero_grad()
        return total

    return step


def speculators(args: argparse.Namespace, docs: list[dict[str, torch.Tensor]]) -> Callable[[], float]:
    """speculators' model and optimizer around all documents in one row."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from transformers import LlamaConfig

    dtype = getattr(torch, args.dtype)
    table, t2d, d2t = head_and_vocab(args)
    layer = LlamaConfig(**llama(args))
    layer._attn_implementation = "sdpa"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=len(d2t), eagle_aux_hidden_state_layer_ids=[2, 15, 27],
    )  # fmt: skip
    model = Eagle3DraftModel(config)
    model.load_vocab_mappings(t2d, d2t)
    model.embed_tokens.weight.data.copy_(table)
    for head in (model.lm_head, model.verifier_lm_head):
        head.weight.data.copy_(table[t2d])
        head.weight.requires_grad_(False)
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=RATE)
    lengths = torch.tensor([len(doc["ids"]) for doc in docs])
    batch = {
        "hidden_states": torch.cat([doc["taps"].flatten(1) for doc in docs])[None],
        "input_ids": torch.cat([doc["ids"] for doc in docs])[None],
        "loss_mask": torch.cat([doc["mask"] for doc in docs])[None],
        "document_ids": torch.repeat_interleave(torch.arange(len(docs)), lengths)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "verifier_last_hidden_states": torch.cat([doc["last"] for doc in docs])[None],
    }
    losses = resolve_loss_config("kl_div", "eager")

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            _, loss, _ = model(**batch, ttt_steps=args.ttt_steps, ttt_step_loss_decay=0.8, loss_config=losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


TRAINERS = {
    "fledge": fledge,
    "fledge-depths": fledge,
    "specforge": specforge,
    "specforge-compact": specforge,
    "speculators": speculators,
}

if __name__ == "__main__":
    main()
