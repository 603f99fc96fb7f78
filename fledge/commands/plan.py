"""`fledge plan`: what a training run will need, before anything is loaded or started.

Reads the target's config (no weights), counts tokens by sampling the data, and works out memory by part, disk, FLOP,
hours online and offline, and the longest sequence that fits. Memory is arithmetic (`fledge.train.memory`); hours are
FLOP over an assumed share of the hardware's peak, and say so.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fledge.console import duration, print_document, say, show_table, warn
from fledge.data.settings import TemplateSettings
from fledge.errors import UserError, nearest
from fledge.ranges import Count, Natural, Positive
from fledge.storage.settings import StorageSettings
from fledge.target.settings import PrefillSettings, TargetSettings
from fledge.train.settings import BlockSettings, UnrollSettings

if TYPE_CHECKING:
    from fledge.train.costs import StepCosts

GIB = 2**30
# name -> memory in GiB, dense bf16 TFLOP/s as the makers state them
HARDWARE = {
    "gb200": (186e9 / GIB, 2500.0), "b300": (288e9 / GIB, 2250.0), "b200": (180e9 / GIB, 2250.0),
    "h200": (141e9 / GIB, 989.0), "h100": (80e9 / GIB, 989.0), "h800": (80e9 / GIB, 989.0),
    "h20": (96e9 / GIB, 148.0), "a100-80": (80e9 / GIB, 312.0), "a100-40": (40e9 / GIB, 312.0),
    "a800": (80e9 / GIB, 312.0), "l40s": (48e9 / GIB, 362.0), "l20": (48e9 / GIB, 119.5), "a10": (24e9 / GIB, 125.0),
    "rtx3090": (24e9 / GIB, 71.0), "rtx4090": (24e9 / GIB, 165.0), "rtx5090": (32e9 / GIB, 209.5),
    "mi300x": (192e9 / GIB, 1307.0), "mi325x": (256e9 / GIB, 1307.0), "mi355x": (288e9 / GIB, 2500.0),
}  # fmt: skip
RUNTIME_BYTES = int(0.7 * GIB)  # CUDA context, library workspaces
SUPERVISED_SHARE = 0.7  # of the tokens, where only their number is known
TRAIN_EFFICIENCY, TARGET_EFFICIENCY = 0.35, 0.45  # shares of the peak that training and forward passes reach
ROOM = 0.94  # share of a GPU's memory that can be used: the rest is lost between blocks


@dataclass(frozen=True, kw_only=True)
class PlanArgs(TargetSettings, PrefillSettings, TemplateSettings, UnrollSettings, BlockSettings, StorageSettings):
    """What is planned."""

    target: str
    """The target: only its config is read."""
    data: tuple[str, ...] = ()
    """Conversations; tokens are counted on a sample with the target's tokenizer. Empty: give --num-tokens."""
    columns: tuple[str, ...] = ()
    """Columns under other names, as OURS=YOURS: --columns system=persona messages=dialog (docs/formats.md)."""
    num_tokens: Count | None = None
    """Tokens of the data set, instead of --data."""
    sample: Count = 200
    """Conversations that are tokenised to estimate the rest."""
    model_max_length: Count = 2048
    """Longest sample in tokens."""
    per_device_train_batch_size: Count = 4
    """Sequences per device and step."""
    num_train_epochs: Positive = 10
    """Passes over the data."""
    draft_vocab_size: Natural | None = None
    """Target tokens the draft may propose. 0: all. None: 32000; all, of a block draft."""
    activation_checkpointing: bool = False
    """Compute TTT steps again in the backward."""
    bf16: bool = True
    """bfloat16 mixed precision with fp32 master weights."""
    hardware: str | None = None
    """h200, h100, h20, b200, a100-80, l40s, rtx4090, mi300x, cpu ...; a wrong name lists all. None: --gpu-memory-gb and
    --tflops."""
    gpu_memory_gb: Positive | None = None
    """Memory of a GPU in GiB."""
    tflops: Positive | None = None
    """Dense bf16 peak of a device, TFLOP/s."""
    num_gpus_total: Count = 1
    """Devices."""


MAIN = (
    "target", "data", "num_tokens", "hardware", "num_gpus_total", "model_max_length", "per_device_train_batch_size",
    "num_train_epochs", "ttt_steps", "depth_survival", "sequence_parallel", "draft_vocab_size", "draft_type",
    "chat_template_type", "tap_storage", "last_storage", "activation_checkpointing", "bf16", "gpu_memory_gb", "tflops",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The data set."""

    conversations: int
    tokens: int
    supervised: int
    longest: int


def plan(args: PlanArgs) -> None:
    """What a training run needs: memory by part, disk, hours, and the longest sequence that fits."""
    document = estimate(args)
    memory = document["memory_gib"]
    show_table("memory of one process, GiB", ["part", "offline", "online"], [
        [part, *(_gib(memory[side][part]) for side in ("offline", "online"))] for part in memory["online"]
        if any(memory[side][part] for side in memory)
    ])  # fmt: skip
    show_table("run", ["", "value"], run_rows(document["run"]))
    for message in document["warnings"]:
        warn(message)
    print_document(document)


def _gib(value: float) -> str:
    return "-" if not value else f"{value:.2f}" if value >= 0.01 else "< 0.01"


def run_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    """The run's figures in the words of people."""
    return [
        *((name.replace("_", " "), f"{run[name]:,}") for name in ("conversations", "tokens", "supervised_tokens")),
        *((f"{who} parameters", f"{run[f'{who}_parameters']:,}") for who in ("target", "draft")),
        ("steps per epoch", f"{run['steps_per_epoch']:,}"),
        ("hidden states on disk (offline)", f"{_gib(run['store_gib'])} GiB"),
        *((f"time {side}", duration(3600 * run[f"hours_{side}"])) for side in ("offline", "online")),
        *(
            (f"longest sequence {side}", f"{longest:,} tokens" if longest else "none fits")
            for side in ("offline", "online") for longest in [run[f"longest_sequence_{side}"]]
        ),
    ]  # fmt: skip


def estimate(args: PlanArgs) -> dict[str, Any]:
    """Everything `fledge plan` prints, as one document."""
    from transformers import AutoConfig

    device_memory, tflops, device_type = hardware(args)
    config = AutoConfig.from_pretrained(args.target)
    text = config.get_text_config()
    target, costs = target_size(config), costs_of(args, text)
    work = count(args)
    mean = work.tokens / max(work.conversations, 1)
    share = work.supervised / max(work.tokens, 1)

    def sides(sequences: int, length: int) -> dict[str, dict[str, float]]:
        step = costs.memory(
            sequences, length, share, bf16=args.bf16, state_bytes=target.bytes_per_number, device_type=device_type
        )
        ends = target.ends * target.bytes_per_number
        shared = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        online = target.parameters * target.bytes_per_number
        forward = target.bytes_per_number * forward_numbers(text, costs.config, length, args.prefill_chunk)
        runtime = RUNTIME_BYTES if device_type == "cuda" else 0
        return {
            "offline": {**shared, "target": ends, "target's forward": 0, "runtime": runtime,
                        "peak": step.peak + ends + runtime},
            "online": {**shared, "target": online, "target's forward": forward, "runtime": runtime,
                       "peak": step.peak + online + runtime + forward},
        }  # fmt: skip

    needed = sides(args.per_device_train_batch_size, args.model_max_length)
    groups = max(1, args.num_gpus_total // args.sequence_parallel)
    steps = math.ceil(work.conversations / args.per_device_train_batch_size / groups)
    train_flop = costs.flop(round(mean), share) * work.conversations * args.num_train_epochs
    target_flop = 2.0 * target.active * work.tokens
    speed = tflops * 1e12 * args.num_gpus_total * 3600
    train_h, target_h = train_flop / speed / TRAIN_EFFICIENCY, target_flop / speed / TARGET_EFFICIENCY
    longest = {
        side: longest_that_fits(lambda length, side=side: sides(1, length)[side]["peak"], device_memory * GIB)
        for side in ("offline", "online")
    }  # fmt: skip
    run = {
        "conversations": work.conversations, "tokens": work.tokens, "supervised_tokens": work.supervised,
        "target_parameters": target.parameters, "draft_parameters": costs.parameters, "steps_per_epoch": steps,
        "store_gib": round(store_bytes(args, target, costs.config, work) / GIB, 2),
        "train_flop": f"{train_flop:.2e}", "target_flop_per_epoch": f"{target_flop:.2e}",
        "hours_offline": round(train_h + target_h, 4),
        "hours_online": round(train_h + target_h * args.num_train_epochs, 4),
        "longest_sequence_offline": longest["offline"], "longest_sequence_online": longest["online"],
    }  # fmt: skip
    in_gib = {side: {part: value / GIB for part, value in parts.items()} for side, parts in needed.items()}
    return {"memory_gib": in_gib, "run": run, "warnings": warnings(in_gib, device_memory, args, longest)}


def forward_numbers(text: Any, draft: Any, length: int, prefill_chunk: int) -> int:
    """Numbers that a forward pass of the target keeps at a time; read in parts, keys and values of the whole text."""
    from fledge.drafters.layer_config import attention_shape

    part = min(prefill_chunk or length, length)
    cached = 0
    if part < length:
        _, kv_heads, head_dim = attention_shape(text)
        cached = 2 * text.num_hidden_layers * kv_heads * head_dim * length
    return part * (6 * text.hidden_size + 3 * draft.intermediate_size) + cached


def costs_of(args: PlanArgs, text: Any) -> "StepCosts":
    """The costs of the draft that `fledge train` derives for this target."""
    from fledge.drafters.dspark.config import derive_block, usual_block_taps
    from fledge.drafters.eagle3.config import derive
    from fledge.target.record import default_tap_layers
    from fledge.train.costs import BlockCosts, EagleCosts
    from fledge.train.eagle import DEFAULT_DRAFT_VOCAB

    layers, wanted = text.num_hidden_layers, args.draft_vocab_size
    if args.draft_type == "dflash" or args.draft_type == "dspark":
        if args.activation_checkpointing:
            raise UserError(f"--activation-checkpointing: a {args.draft_type} draft has no steps to compute again.")
        if args.sequence_parallel > 1:
            raise UserError(
                f"--sequence-parallel: a {args.draft_type} draft's sequences are not divided. Leave it out."
            )
        given = {"num_layers": args.draft_layers, "block_size": args.block_size}
        block = derive_block(
            text, args.draft_type, vocab_size=text.vocab_size, tap_layers=usual_block_taps(layers), mask_token_id=0,
            draft_vocab_size=wanted, overrides={name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        return BlockCosts(block, args.num_anchors)
    size = DEFAULT_DRAFT_VOCAB if wanted is None else wanted or text.vocab_size
    draft = derive(
        text, vocab_size=text.vocab_size, tap_layers=default_tap_layers(layers), draft_vocab_size=size,
        eagle31=args.draft_type == "eagle3.1", overrides={"num_layers": args.draft_layers or 1},
    )  # fmt: skip
    return EagleCosts(draft, args.ttt_steps, args.depth_survival, args.activation_checkpointing, args.sequence_parallel)


def warnings(memory: dict[str, dict[str, float]], device_gib: float, args: PlanArgs, longest: dict) -> list[str]:
    """What does not fit, and what to do."""
    found = []
    for side in ("offline", "online"):
        if memory[side]["peak"] > ROOM * device_gib:
            is_block = args.draft_type in ("dflash", "dspark")
            leaner = f"lower --num_anchors {args.num_anchors}" if is_block else "set --activation_checkpointing"
            what = (
                f"lower --per_device_train_batch_size {args.per_device_train_batch_size} or --model_max_length "
                f"{args.model_max_length}, or {leaner}"
                if longest[side]
                else "even one short sequence does not fit: shard the draft (FSDP, ZeRO), and the target over GPUs"
            )
            found.append(f"{side} needs {memory[side]['peak']:.1f} GiB of {device_gib:.1f}: {what}.")
    return found


def hardware(args: PlanArgs) -> tuple[float, float, str]:
    """Memory in GiB, peak in TFLOP/s and kind of the device."""
    memory, tflops, kind = args.gpu_memory_gb, args.tflops, "cuda"
    name = (args.hardware or "").lower().replace("_", "-")
    if name == "cpu":
        kind = "cpu"
    elif name:
        if name not in HARDWARE:
            raise UserError(
                f"--hardware {args.hardware!r} is unknown{nearest(name, HARDWARE)}. Known: {', '.join(HARDWARE)}, cpu. "
                f"For another give --gpu-memory-gb and --tflops."
            )
        memory, tflops = memory or HARDWARE[name][0], tflops or HARDWARE[name][1]
    if memory is None or tflops is None:
        given = f"with --hardware {name}" if name else "where no --hardware is named"
        raise UserError(
            f"--gpu-memory-gb and --tflops are needed {given}: memory and dense bf16 peak of one device. Or name one "
            f"of {', '.join(HARDWARE)}."
        )
    return memory, tflops, kind


@dataclass(frozen=True)
class TargetSize:
    """Parameters of a target by its config."""

    parameters: int
    active: int  # of a mixture of experts: those one token meets
    ends: int  # embedding and head
    bytes_per_number: int


def target_size(config: Any) -> TargetSize:
    """Builds the model without memory and counts; nothing is downloaded but the config."""
    import torch
    from transformers import AutoModelForCausalLM

    from fledge.target.model import auto_class

    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.bfloat16
    maker = AutoModelForCausalLM if text is config else auto_class(config)
    with torch.device("meta"):
        model = maker.from_config(config)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    experts = experts or getattr(text, "n_routed_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None) or experts
    total = routed = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        routed += parameter.numel() if ".experts." in name else 0
    active = total - routed + (round(routed * chosen / experts) if experts and chosen else 0)
    ends = text.vocab_size * text.hidden_size * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    return TargetSize(total, active, ends, torch.empty(0, dtype=dtype).element_size())


def store_bytes(args: PlanArgs, target: TargetSize, draft: Any, work: Work) -> int:
    """Size of the hidden states on disk, with the target's head beside them."""
    size, taps, element = draft.hidden_size, len(draft.tap_layers), target.bytes_per_number
    per_tap = size + 4 if args.tap_storage == "fp8" else size * element
    last_rows = work.supervised if args.last_storage == "supervised" else work.tokens
    return work.tokens * (taps * per_tap + 5) + last_rows * size * element + target.ends * element


def count(args: PlanArgs) -> Work:
    """Conversations and tokens of the data, from a random sample of it."""
    if not args.data:
        if args.num_tokens is None:
            raise UserError("--data or --num-tokens is needed: how much there is to train on.")
        length = args.model_max_length
        number = max(1, args.num_tokens // length)
        return Work(number, args.num_tokens, round(args.num_tokens * SUPERVISED_SHARE), length)
    from fledge.data.conversations import Conversation, read_conversations
    from fledge.data.rejects import Rejects
    from fledge.data.tokenize import ChatTemplate

    template = ChatTemplate.from_pretrained(args.target, args.chat_template_type or None, untraced="train")
    chance, seen = random.Random(0), 0
    chosen: list[Conversation] = []
    for path in args.data:
        for conversation in read_conversations(path, rejects=Rejects(), columns=args.columns):
            seen += 1
            if len(chosen) < args.sample:
                chosen.append(conversation)
            elif (place := chance.randrange(seen)) < args.sample:
                chosen[place] = conversation
    samples = [s for conversation in chosen for s in template.samples(conversation, args.model_max_length)]
    if not samples:
        raise UserError(f"{', '.join(args.data)}: none of {len(chosen)} sampled conversations has an answer to learn.")
    scale = seen / len(chosen)
    tokens = sum(len(sample.input_ids) for sample in samples)
    supervised = sum(int(sample.loss_mask.sum()) for sample in samples)
    say(f"{len(chosen)} of {seen} conversations tokenised; the rest is scaled up")
    longest = max(len(sample.input_ids) for sample in samples)
    return Work(round(len(samples) * scale), round(tokens * scale), round(supervised * scale), longest)


def longest_that_fits(peak: Any, memory: float) -> int:
    """The longest single sequence, in steps of 64 tokens, whose peak fits; 0 when none does."""
    if peak(64) > ROOM * memory:
        return 0
    low, high = 1, 1 << 14  # units of 64 tokens: up to a million
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(64 * middle) <= ROOM * memory else (low, middle - 1)
    return 64 * low
