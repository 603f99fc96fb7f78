"""The target in this process as a source: conversations go in, its states are computed as they are asked for."""

from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.train.arguments import TrainSettings
from fledge.train.sources import Source, conversations


def live_source(args: TrainSettings) -> Source:
    """The target over tokenised conversations."""
    inputs = args.inputs
    assert inputs.target is not None
    if inputs.server:
        raise UserError("--server is for --target-backend vllm; the hf backend runs the target in this process.")
    target = Target.from_pretrained(
        inputs.target, dtype=args.inputs.dtype, device=args.trainer.device,
        tap_layers=args.draft.taps(), min_pixels=inputs.min_pixels, max_pixels=inputs.max_pixels,
        chat_template=inputs.chat_template_type,
    )  # fmt: skip
    template = ChatTemplate(
        target.tokenizer, inputs.chat_template_type or None, eos_token_ids=target.eos_token_ids, vision=target.vision,
        last_turn_only=inputs.train_last_turn_only, untraced=inputs.untraced,
    )  # fmt: skip
    train_data, held_out, counts, always = conversations(inputs, template, target.vocab_size)
    return Source(
        train=train_data,
        eval=held_out,
        to_record=LiveSource(target, prefill_chunk=inputs.prefill_chunk).record,
        counts=counts,
        always=always,
        text_config=target.text_config,
        tap_layers=target.tap_layers,
        embedding=target.embedding_weight,
        head_weight=target.head_weight,
        teacher_head=target.head,
        target_name=target.name,
        device=args.trainer.device,
        target=target,
        teacher_rows=TargetHead.of(target).rows,
    )
