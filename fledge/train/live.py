"""The target in this process as a source: conversations go in, its states are computed as they are asked for."""

from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.train.arguments import TrainArgs
from fledge.train.sources import Source, conversations


def live_source(args: TrainArgs) -> Source:
    """The target over tokenised conversations."""
    data = args.data
    assert data.target_model_name_or_path is not None
    if data.server:
        raise UserError("--server is for --target_backend vllm; the hf backend runs the target in this process.")
    target = Target.from_pretrained(
        data.target_model_name_or_path, dtype=args.draft.target_dtype, device=args.trainer.device,
        tap_layers=args.draft.tap_layers or None, min_pixels=data.min_pixels, max_pixels=data.max_pixels,
    )  # fmt: skip
    template = ChatTemplate(
        target.tokenizer, data.chat_template_type or None, eos_token_ids=target.eos_token_ids, vision=target.vision,
        last_turn_only=data.train_last_turn_only, untraced=data.untraced,
    )  # fmt: skip
    train_data, held_out, counts, always = conversations(data, template, target.vocab_size)
    return Source(
        train=train_data,
        eval=held_out,
        to_record=LiveSource(target).record,
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
