"""Data or stored states in, a draft head out.

Puts the stages together: source -> draft vocabulary -> draft -> Trainer -> final head with provenance.
"""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from transformers import AutoConfig, set_seed

from fledge import provenance
from fledge.console import say, show_table
from fledge.data.image_urls import allow_image_urls
from fledge.data.rows import check_source
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.layer_config import LayerConfig, refuse_other_target
from fledge.errors import UserError
from fledge.storage.angelslim import ckpt_files
from fledge.storage.states.manifest import MANIFEST
from fledge.target.model import Target
from fledge.target.record import TargetRecord
from fledge.target.settings import Dtype
from fledge.train.arguments import TrainSettings
from fledge.train.continuation import check_resumable, check_same_inputs
from fledge.train.evaluate import DecodingCallback, decoding_evaluation
from fledge.train.kinds import KINDS
from fledge.train.resume import begin, check_same_run, check_start, find_checkpoint
from fledge.train.shared_batches import share_of_process
from fledge.train.sources import Source
from fledge.train.trainer import DraftTrainer

STARTING_SAMPLES = 8  # whose states set the scale of a fresh head

_last_operations: list = []  # never freed: see `leave`


def train(args: TrainSettings) -> None:
    """Train a draft head: online (--data, the target in this process) or offline (--states).

    Ends with a head in --output_dir that fledge, vLLM and SGLang load. A run that was stopped continues where it was.
    """
    allow_image_urls(args.inputs.allow_image_urls)
    output_dir, wanted = Path(str(args.trainer.output_dir)), args.trainer.resume_from_checkpoint
    check_start(output_dir, wanted, args.trainer.overwrite)
    if (checkpoint := find_checkpoint(output_dir, wanted)) is not None:
        check_resumable(Path(checkpoint))
    check_flags(args)
    set_seed(args.trainer.seed)
    source = open_source(args)
    draft = make_draft(args, source)
    _resolve(args, draft.config, source)
    module = KINDS[args.draft.draft_type].module(draft, args, source)
    evaluation = decoding_evaluation(args.evaluation, source, lambda: target_for_evaluation(args, source))
    with run_folder(args, source) as (run, checkpoint):
        trainer = DraftTrainer(
            module, args.trainer, to_record=source.to_record, train_dataset=source.train, eval_dataset=source.eval,
            save_dtype=getattr(torch, args.draft.save_dtype), run=run,
        )  # fmt: skip
        steps = args.evaluation.eval_decode_steps
        decoding = DecodingCallback(trainer, evaluation, steps) if evaluation is not None else None
        if decoding is not None:
            trainer.add_callback(decoding)
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            if trainer.is_world_process_zero():
                say(what_is_kept(output_dir, trainer.state.global_step))
            raise
        trainer.save_model()
        if decoding is not None and args.evaluation.eval_decode_load_best:
            decoding.make_best_final()
        finish(trainer, args, source, result.metrics)
    leave(args.trainer.device)


def what_is_kept(output_dir: Path, step: int) -> str:
    """Where a run that was stopped at this step goes on."""
    newest = find_checkpoint(output_dir, "auto")
    if newest is None:
        return (
            f"no checkpoint was written yet (--save_steps): the {step} steps are lost, and the same command starts anew"
        )
    saved = int(Path(newest).name.removeprefix("checkpoint-"))
    return f"the same command continues from {newest}; {step - saved} of {step} steps are lost"


def check_flags(args: TrainSettings) -> None:
    """Look at what the flags name and ask before a target is loaded, which may take minutes."""
    for path in (*args.inputs.data, *args.inputs.eval_data):
        check_source(path)
    KINDS[args.draft.draft_type].check(args.draft)
    share_of_process(args.trainer, args.draft.sequence_parallel)
    target = args.inputs.target
    if args.draft.draft_config and target and (Path(target) / "config.json").is_file():
        refuse_other_target(Path(args.draft.draft_config), AutoConfig.from_pretrained(target).get_text_config())


@contextmanager
def run_folder(args: TrainSettings, source: Source) -> Iterator[tuple[str, str | None]]:
    """The output folder as this run's own: its run id (of the process that saves), the checkpoint to resume from."""
    output_dir, wanted, held = Path(str(args.trainer.output_dir)), args.trainer.resume_from_checkpoint, None
    try:
        with args.trainer.main_process_first(local=args.trainer.save_on_each_node, desc="claiming the output folder"):
            if args.trainer.should_save:
                held = begin(output_dir, wanted, args.trainer.overwrite)
            checkpoint = find_checkpoint(output_dir, wanted)
            if held is not None:
                check_same_run(output_dir, args.resolved(), checkpoint is not None)
                check_same_inputs(output_dir, source, resuming=checkpoint is not None)
        if checkpoint is not None:
            say(f"resuming from {checkpoint}")
        yield held.run if held is not None else "", checkpoint
    finally:
        if held is not None:
            held.release()


def open_source(args: TrainSettings) -> Source:
    """What the flags ask to train on. Each kind is imported only when it is asked for."""
    inputs = args.inputs
    if not inputs.states:
        if not inputs.target:
            raise UserError("--target is needed for online training: its folder or hub name.")
        if not inputs.data:
            raise UserError("--data is needed (conversations), or --states (stored states).")
        if inputs.target_backend == "vllm":
            from fledge.train.served import served_source

            return served_source(args)
        from fledge.train.live import live_source

        return live_source(args)
    folders = [Path(path).expanduser() for path in (*inputs.states, *inputs.eval_states)]
    foreign = [folder for folder in folders if not (folder / MANIFEST).is_file() and ckpt_files(folder)]
    if foreign and len(foreign) < len(folders):
        raise UserError(f"{foreign[0]} holds .ckpt files, the other paths stores of fledge: train on one kind.")
    if foreign:
        from fledge.train.foreign import angelslim_source

        return angelslim_source(args)
    if inputs.data or inputs.eval_data:
        from fledge.train.cached import cached_source

        return cached_source(args)
    from fledge.train.stored import stored_source

    return stored_source(args)


def target_for_evaluation(args: TrainSettings, source: Source) -> Target:
    """The target of stored states, loaded because --eval-decode-steps decodes with it."""
    name = args.inputs.target
    if not name:
        raise UserError(
            f"--eval-decode-steps decodes with the target, which training from stored states does not load. Give "
            f"--target (the states are of {source.target_name}), or leave --eval-decode-steps out "
            f"and measure with `fledge bench`."
        )
    say(f"loading {name} for the evaluation by decoding")
    dtype = source.head_weight.dtype if args.inputs.dtype == "auto" else args.inputs.dtype
    target = Target.from_pretrained(name, dtype=dtype, device=args.trainer.device, tap_layers=source.tap_layers)
    if not torch.equal(target.embedding_weight.to(source.embedding), source.embedding):
        raise UserError(
            f"{name}: its embedding is not that of the target whose states are trained on ({source.target_name}). Give "
            f"the same target, or leave --eval-decode-steps out."
        )
    return target


def make_draft(args: TrainSettings, source: Source) -> BoundHead:
    """The draft of the flags, in fp32."""
    torch.manual_seed(args.trainer.seed)

    def first() -> list[TargetRecord]:
        return [source.to_record(source.train[index]) for index in range(min(STARTING_SAMPLES, len(source.train)))]

    if args.draft.draft_config:  # again: the target may be one of the hub, or known to the stored states only
        refuse_other_target(Path(args.draft.draft_config), source.text_config)
    draft = KINDS[args.draft.draft_type].make(args.draft, source, first)
    if args.trainer.verbose:
        fields = draft.document(args.draft.save_dtype).items()
        show_table("draft head", ["field", "value"], [[key, value] for key, value in fields if value is not None])
    num_parameters = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    say(
        f"{args.draft.draft_type} draft: {num_parameters / 1e6:.1f} M trained parameters; its taps are the inputs of "
        f"layers {', '.join(map(str, draft.config.tap_layers))}"
    )
    return draft.to(source.device, torch.float32)


def _resolve(args: TrainSettings, config: LayerConfig, source: Source) -> None:
    """Put what was derived in the place of what was not given: a flag that equals it may be given or left out."""
    trainer = args.trainer
    if trainer.learning_rate is None:
        trainer.learning_rate = KINDS[args.draft.draft_type].learning_rate(config.hidden_size)
        say(f"learning rate {trainer.learning_rate:.1e} (by the hidden size {config.hidden_size}, at most 1e-3)")
    derived: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size, "tap_layers": tuple(config.tap_layers)}
    derived["draft_layers"] = config.num_layers
    if isinstance(config, BlockConfig):
        derived["block_size"] = config.block_size
    args.draft = replace(args.draft, **derived)
    for dtype in get_args(Dtype):
        if source.target is not None and str(source.target.dtype) == f"torch.{dtype}":
            args.inputs = replace(args.inputs, dtype=dtype)


def finish(trainer: DraftTrainer, args: TrainSettings, source: Source, metrics: dict[str, float]) -> None:
    """Final evaluation, provenance beside the head, and the command that measures it."""
    output_dir = Path(str(args.trainer.output_dir))
    if trainer.eval_dataset is not None:
        metrics = {**metrics, **(trainer.evaluated or trainer.evaluate())}
    if not trainer.is_world_process_zero():
        return
    trainer.save_state()
    provenance.write(
        output_dir / "provenance.json", args.resolved(), target=source.target_name, steps=trainer.state.global_step,
        metrics=metrics,
    )  # fmt: skip
    say(f"the head is in {output_dir}; this measures it:")
    say(measuring(args, args.inputs.target or source.target_name))


def measuring(args: TrainSettings, target: str) -> str:
    """The command that measures the head, as a shell takes it."""
    words = ["--target", target, "--draft", str(args.trainer.output_dir), "--bench-name", "quick"]
    if args.inputs.chat_template_type:
        words += ["--chat-template-type", args.inputs.chat_template_type]
    return f"fledge bench {shlex.join(words)}"


def leave(device: torch.device) -> None:
    """Wait for the other ranks before the process ends: a rank that still communicates with an ended one aborts.

    A thread of gloo frees each finished operation and needs the interpreter's lock for its tensors. If this process
    meanwhile frees its groups it hangs; if it ends it aborts (torch 2.13, `ProcessGroupGloo::runLoop`). So the last
    operation is never freed, and the thread gets the lock for earlier ones while this one sleeps.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        one = torch.zeros(1, device=device)
        last = dist.all_reduce(one, async_op=True)
        last.wait()
        one.item()  # on a GPU this is what waits
        _last_operations.append(last)
        time.sleep(0.1)
        dist.destroy_process_group()
