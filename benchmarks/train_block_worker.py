"""One trainer of block drafts in a process of its own, as train_step_worker.py has it for EAGLE-3.

    python benchmarks/train_block_worker.py fledge --draft-type dspark --documents documents.json --steps 3

Run by train_step.py --draft-type dflash|dspark with the Python of the trainer's own environment. The draft is the same
for all (LAYERS layers, five taps, the whole vocabulary, published block sizes), and so is the number of anchors. All
weights and states are random. Losses are each trainer's own for that draft, in eager form: Triton needs a GPU.

- fledge         documents packed into one row; CE to the target (dflash), 0.1 CE + 0.9 TV and confidence (dspark);
                 dynamic weights;
- specforge      one document after the other; dense mask and sdpa attention; its chunks of 128 blocks, computed again
                 in the backward. Its dflash learns the data's tokens instead of the target's distribution: no teacher;
- speculators    documents packed into one row with document ids; dense mask and sdpa attention; CE (dflash),
                 0.1 CE + 0.9 TV + confidence (dspark); dynamic weights where the loss is CE alone.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_step_worker import RATE, SHAPES, documents, run

LAYERS = 4  # what fledge derives for a target of 30 layers
TAPS = (1, 7, 14, 20, 27)  # outputs of layers
BLOCK = {"dflash": 16, "dspark": 7}
RANK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--draft-type", choices=BLOCK, default="dspark")
    parser.add_argument("--documents", type=Path, required=True, help='JSON: [{"ids": [...], "mask": [...]}, ...]')
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--anchors", type=int, default=128, help="of a document (speculators: of all together as many)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps after one that is not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(json.dumps(run(TRAINERS[args.trainer](args, documents(args, len(TAPS))), args)))


def target_head(args: argparse.Namespace) -> torch.Tensor:
    """The target's head and embedding (V, H)."""
    size, *_, vocab, _ = SHAPES[args.shape]
    return (torch.randn(vocab, size) * 0.1).to(getattr(torch, args.dtype))


def fledge(args: argparse.Namespace, docs: list[dict[str, torch.Tensor]]) -> Callable[[], torch.Tensor]:
    """The module and the optimizer of `fledge train`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fledge.drafters.batch import pack
    from fledge.drafters.cpu_kernels import filled_up
    from fledge.drafters.dspark.loss import BlockLossSettings
    from fledge.drafters.dspark.model import BlockDraft
    from fledge.drafters.dspark.training import BlockModule
    from fledge.target.head import TargetHead
    from fledge.target.quirks import LogitQuirks
    from fledge.target.record import TargetRecord, TeacherSummary

    device, table = torch.device(args.device), target_head(args)
    table = table.to(device)
    head = TargetHead(embedding=table, weight=table, bias=None, quirks=LogitQuirks(), keys=("lm_head.weight",))
    records = [
        TargetRecord(sample_id=str(number), input_ids=doc["ids"], loss_mask=doc["mask"],
                     position_ids=torch.arange(len(doc["ids"])), tap_hidden=doc["taps"], last_hidden=doc["last"],
                     summary=TeacherSummary.of(head, doc["last"].to(device), doc["mask"]))
        for number, doc in enumerate(docs)
    ]  # fmt: skip
    batch = pack([record.to(device) for record in filled_up(records, device)])
    draft = BlockDraft(block_config(args), table, table).to(device)
    kind = "ce+tv" if args.draft_type == "dspark" else "ce"
    module = BlockModule(draft, head, BlockLossSettings(kind=kind), head.rows, num_anchors=args.anchors)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), fused=True)
    numbers = iter(range(1 << 30))

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = module(batch, draw=next(numbers)).loss / len(docs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def block_config(args: argparse.Namespace):  # noqa: ANN201 -- fledge is imported by its own trainer only
    """The draft as fledge's config."""
    from fledge.drafters.dspark.config import BlockConfig

    size, inner, heads, kv_heads, head_dim, vocab, _ = SHAPES[args.shape]
    is_dspark = args.draft_type == "dspark"
    return BlockConfig(
        hidden_size=size, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, vocab_size=vocab, draft_vocab_size=vocab, tap_layers=tuple(layer + 1 for layer in TAPS),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, num_layers=LAYERS,
        block_size=BLOCK[args.draft_type], mask_token_id=vocab - 1, sample_from_anchor=is_dspark,
        markov_rank=RANK if is_dspark else 0, confidence=is_dspark,
    )  # fmt: skip


def qwen3(args: argparse.Namespace) -> dict:
    """The draft's layers as the keywords of a Qwen3Config."""
    size, inner, heads, kv_heads, head_dim, vocab, _ = SHAPES[args.shape]
    return {
        "hidden_size": size, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "num_hidden_layers": LAYERS,
        "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def frozen(module: torch.nn.Module, table: torch.Tensor) -> torch.nn.Module:
    """A head or an embedding with the target's weight."""
    module.weight = torch.nn.Parameter(table, requires_grad=False)
    return module


def specforge(args: argparse.Namespace, docs: list[dict[str, torch.Tensor]]) -> Callable[[], float]:
    """SpecForge's model and optimizer around one batch per document."""
    from specforge.algorithms.common import dflash_family_model as family
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from specforge.optimizer import BF16Optimizer
    from transformers import Qwen3Config

    dtype, low, is_dspark = getattr(torch, args.dtype), args.dtype == "bfloat16", args.draft_type == "dspark"
    table = target_head(args)
    own: dict[str, Any] = {"mask_token_id": len(table) - 1, "target_layer_ids": list(TAPS)}
    if is_dspark:
        own |= {"markov_rank": RANK, "enable_confidence_head": True, "confidence_head_with_markov": True}
    block: dict[str, Any] = {
        "block_size": BLOCK[args.draft_type], "num_target_layers": 30, "dflash_config": own,
    }  # fmt: skip
    config = Qwen3Config(**qwen3(args), **block)
    config._attn_implementation = "sdpa"
    draft = (DSparkDraftModel if is_dspark else DFlashDraftModel)(config).to(dtype).train()
    size = table.shape[1]
    model = (family.OnlineDSparkModel if is_dspark else family.OnlineDFlashModel)(
        draft, frozen(torch.nn.Linear(size, 1, bias=False), table), frozen(torch.nn.Embedding(1, size), table),
        mask_token_id=len(table) - 1, block_size=BLOCK[args.draft_type], attention_backend="sdpa",
        num_anchors=args.anchors, loss_decay_gamma=4.0, **({} if is_dspark else {"loss_type": "dpace"}),
    )  # fmt: skip
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # bf16 trains with fp32 master copies; in fp32 such copies would only cost it memory, so plain AdamW
    optimizer = BF16Optimizer(model, lr=RATE) if low else torch.optim.AdamW(parameters, lr=RATE)
    batches = [
        {"input_ids": doc["ids"][None], "loss_mask": doc["mask"][None].long(),
         "hidden_states": doc["taps"].flatten(1)[None],
         **({"target_last_hidden_states": doc["last"][None]} if is_dspark else {})}
        for doc in docs
    ]  # fmt: skip

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = model(**batch)[0] / len(batches)
            loss.backward()
            total += loss.item()
        if not low:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()  # BF16Optimizer clips and clears the gradients itself
        if not low:
            optimizer.zero_grad()
        return total

    return step


def speculators(args: argparse.Namespace, docs: list[dict[str, torch.Tensor]]) -> Callable[[], float]:
    """speculators' model and optimizer around all documents in one row."""
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from transformers import Qwen3Config

    dtype, is_dspark = getattr(torch, args.dtype), args.draft_type == "dspark"
    table = target_head(args)
    layer = Qwen3Config(**qwen3(args))
    layer._attn_implementation = "sdpa"
    shape = {
        "transformer_layer_config": layer, "draft_vocab_size": len(table), "block_size": BLOCK[args.draft_type],
        "aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS], "mask_token_id": len(table) - 1,
    }  # fmt: skip
    if is_dspark:
        model = DSparkDraftModel(DSparkSpeculatorConfig(**shape, markov_rank=RANK))
    else:
        model = DFlashDraftModel(DFlashSpeculatorConfig(**shape))
    model = model.to(dtype).train()
    for module in (model.embed_tokens, model.lm_head, model.verifier_lm_head):
        frozen(module, table)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    lengths = torch.tensor([len(doc["ids"]) for doc in docs])
    batch = {
        "hidden_states": torch.cat([doc["taps"].flatten(1) for doc in docs])[None],
        "input_ids": torch.cat([doc["ids"] for doc in docs])[None],
        "loss_mask": torch.cat([doc["mask"] for doc in docs])[None],
        "document_ids": torch.repeat_interleave(torch.arange(len(docs)), lengths)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "verifier_last_hidden_states": torch.cat([doc["last"] for doc in docs])[None],
    }
    settings = {"loss_config": resolve_loss_config("ce", "eager"), "per_position_loss_weight": "dpace"}
    if is_dspark:
        losses = resolve_loss_config('{"ce": 0.1, "tv": 0.9}', "eager")
        settings = {"loss_config": losses, "tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0]}
    forward = functools.partial(model, **batch, **settings, max_anchors=args.anchors * len(docs))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward()[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


TRAINERS = {"fledge": fledge, "specforge": specforge, "speculators": speculators}

if __name__ == "__main__":
    main()
