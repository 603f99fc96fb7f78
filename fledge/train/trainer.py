"""transformers' Trainer with our loss, sources and checkpoints. The loop, resume, DDP / FSDP / DeepSpeed are its own.

Batches are lists of samples (live) or records (stored); `to_record` turns either into records, so the rest cannot tell
them apart. Losses are summed over sequences (or tokens) and divided by their number in the whole optimisation step,
over accumulation and ranks: N processes with batch 1 take the step of one process with batch N.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from fledge.drafters.batch import Batch, pack
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.cpu_kernels import filled_up, num_filler
from fledge.drafters.head_files import save_draft
from fledge.drafters.loss import LossOutput
from fledge.drafters.registry import load_weights
from fledge.drafters.training import DraftModule
from fledge.errors import UserError, free_bytes, gib
from fledge.outputs import delete, mark, replacing
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainerArguments
from fledge.train.metrics import FiniteLosses, MetricSums, taught_positions
from fledge.train.muon import MuonWithAuxiliary, split_parameters
from fledge.train.resume import TRAIN, delete_old, is_complete
from fledge.train.shared_batches import SharedOrder
from fledge.train.shown import ShownProgress


def as_list(items: Sequence[Any]) -> list[Any]:
    """The collator: samples stay samples until the device they are needed on is known."""
    return list(items)


class DraftTrainer(Trainer):
    """Trains a draft. Checkpoints are its folders in fp32, so a resumed run continues exactly."""

    def __init__(
        self,
        module: DraftModule,
        args: TrainerArguments,
        *,
        to_record: Callable[[Any], TargetRecord],
        train_dataset: Any,
        eval_dataset: Any = None,
        save_dtype: torch.dtype = torch.bfloat16,
        run: str = "",
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(
            model=module, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=as_list, callbacks=callbacks,  # type: ignore[arg-type]
        )  # fmt: skip
        self.to_record, self.save_dtype, self.run = to_record, save_dtype, run
        self.model_accepts_loss_kwargs = True  # the loss is already divided for accumulation
        for printing in (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(printing)
        self.shown = ShownProgress(on=self.is_world_process_zero(), verbose=args.verbose)
        self.add_callback(self.shown)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None and args.run_name:
                callback.logging_dir = str(Path(str(args.output_dir)) / "runs" / args.run_name)
        self.evaluated: dict[str, float] | None = None  # what the last evaluation found, if of the weights of now
        self.per_token, self.copies = module.average == "token", module.processes_per_sequence
        self.window, self.finite = MetricSums(module.num_steps, args.device), FiniteLosses(args.device)
        self._window_start, self._window_tokens = time.monotonic(), 0
        if self.is_deepspeed_enabled:
            self._prepare_deepspeed(module)

    @property
    def draft(self) -> BoundHead:
        return self.accelerator.unwrap_model(self.model).draft

    def _prepare_deepspeed(self, module: DraftModule) -> None:
        """ZeRO-3 gathers all weights at once, as each is used at every step, and has to hand them out whole."""
        from deepspeed.utils import set_z3_leaf_modules

        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        wanted = "stage3_gather_16bit_weights_on_model_save"
        if settings.get("stage") == 3 and not settings.get(wanted):
            raise UserError(f'--deepspeed: stage 3 saves no head unless zero_optimization has "{wanted}": true.')
        set_z3_leaf_modules(module, [type(module)])

    # -- batches and loss ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """The Trainer's, but a run whose `max_steps` are done takes no more: the Trainer looks only after a step."""
        if isinstance(resume_from_checkpoint, str | Path) and self.args.max_steps > 0:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(resume_from_checkpoint))
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        try:
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.shown.close()
        self.refuse_infinite()
        return done

    def _prepare_inputs(self, inputs: list[Any]) -> Batch:  # type: ignore[override]
        device = self.args.device
        return pack([record.to(device) for record in filled_up([self._record(item) for item in inputs], device)])

    def _record(self, item: Any) -> TargetRecord:
        """A sample's record; a damaged one is named."""
        try:
            return self.to_record(item)
        except (ValueError, IndexError, AssertionError) as error:
            name = getattr(item, "id", None) or getattr(item, "sample_id", "?")
            raise UserError(
                f"sample {name!r} cannot be trained on ({' '.join(str(error).split())}). Mend or remove it and run "
                f"the same command again: it resumes from the last checkpoint in {self.args.output_dir}."
            ) from error

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, unless processes share sequences."""
        if self.copies == 1:
            return super()._get_train_sampler(train_dataset)
        data: Any = train_dataset or self.train_dataset
        return SharedOrder(len(data), self.copies, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.copies == 1:
            return super()._get_eval_sampler(eval_dataset)
        return SharedOrder(len(eval_dataset), self.copies, None)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Sequences (or taught tokens) of the whole optimisation step, over all ranks."""
        counts = [taught_positions(item.loss_mask) for batch in batch_samples for item in batch]
        number = sum(counts) if self.per_token else sum(count > 0 for count in counts)
        return self.accelerator.reduce(torch.full((), number, device=device), reduction="sum") // self.copies

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of the optimisation step; this batch's share of it."""
        anchor = (torch.zeros((), device=self.args.device, requires_grad=True),) if self.is_deepspeed_enabled else ()
        output: LossOutput = model(inputs, *anchor, draw=self.state.global_step)
        self.window.add(output)
        self._window_tokens += len(inputs.input_ids) - num_filler(inputs)
        ranks = self.accelerator.num_processes  # gradients are averaged over ranks, the loss is a sum over them
        loss = output.loss * ranks / num_items_in_batch.clamp_min(1)
        return (loss, output) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.evaluated = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite.add(loss, self.state.global_step + 1)
        if loss.device.type == "cpu":
            self.refuse_infinite()
        return loss

    def refuse_infinite(self) -> None:
        """Stop if a loss was no number. A GPU is asked when it is waited for anyway: for a log line, an evaluation and
        a checkpoint, which so never holds what came of it."""
        found = self.finite.first_bad()
        if found is not None:
            step, loss = found
            raise UserError(
                f"the loss became {loss} at step {step}. The last checkpoint in {self.args.output_dir} is intact; "
                f"lower --learning_rate or --max_grad_norm and resume from it."
            )

    def create_optimizer(self, model: Any = None) -> Any:
        """Muon for matrices and --optim for the rest, or --optim for all."""
        if self.optimizer is not None or not self.uses_muon:
            return super().create_optimizer(model)
        module: Any = self.model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, module)
        matrices, rest = split_parameters(module)
        options = {**options, "weight_decay": self.args.weight_decay}
        self.optimizer = MuonWithAuxiliary(
            matrices, rest, lambda left: kind(left, **options), lr=options["lr"], weight_decay=self.args.weight_decay
        )
        return self.optimizer

    @property
    def uses_muon(self) -> bool:
        """Whether --matrix_optim and the way the run is distributed say so."""
        wanted = self.args.matrix_optim  # type: ignore[attr-defined]
        if wanted == "muon" and self.sharded:
            raise UserError("--matrix_optim muon needs whole matrices on every process: leave it out under FSDP and "
                            "DeepSpeed (all is then stepped by --optim).")  # fmt: skip
        return wanted != "same" and not self.sharded

    # -- metrics -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.refuse_infinite()
            logs.update(self.window.summary(self.accelerator.reduce(self.window.sums.clone(), reduction="sum")))
            seconds = time.monotonic() - self._window_start
            ranks = self.accelerator.num_processes // self.copies
            logs["tokens_per_s"] = self._window_tokens * ranks / max(seconds, 1e-9)
            self.window.reset()
            self._window_start, self._window_tokens = time.monotonic(), 0
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy by position and predicted tau on held-out records."""
        self.refuse_infinite()
        start = time.monotonic()
        loader = self.get_eval_dataloader(eval_dataset)
        module: Any = self.accelerator.unwrap_model(self.model)
        module.eval()
        sums = MetricSums(self.window.num_steps, self.args.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, sequences or tokens
        with self.shown.bar("evaluation", len(loader)) as bar:
            for items in loader:
                with self.accelerator.autocast():
                    output = module(self._prepare_inputs(items))
                sums.add(output)
                counts = [taught_positions(item.loss_mask) for item in items]
                totals += torch.tensor(
                    [output.loss.item(), sum(counts) if self.per_token else sum(count > 0 for count in counts)],
                    dtype=torch.float64, device=self.args.device,
                )  # fmt: skip
                bar.advance()
        module.train()
        reduced = self.accelerator.reduce(torch.cat((sums.sums, totals)), reduction="sum")
        number = (reduced[-1] / self.copies).clamp_min(1)
        found = {**sums.summary(reduced[:-2]), "loss": (reduced[-2] / number).item()}
        found["runtime_s"] = time.monotonic() - start
        self.not_training(found["runtime_s"])
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items() if math.isfinite(value)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluated = metrics
        return metrics

    def not_training(self, seconds: float) -> None:
        """Leave time since the last log step, that of an evaluation, out of `tokens_per_s`."""
        self._window_start += seconds

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, marked as this run's; what a full disk leaves half written is removed, and the run stops."""
        self.refuse_infinite()
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # `delete_old` keeps to it
        try:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                mark(folder, TRAIN, self.run)
            self.accelerator.wait_for_everyone()  # the marker comes first: without it nobody may delete the rest
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                delete_old(folder.parent, limit, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            if is_complete(folder):
                raise
            if self.args.should_save:
                delete([folder])
            sizes = f"{gib(self.checkpoint_bytes())} are needed, {gib(free_bytes(folder))} free"
            raise UserError(
                f"{folder}: the checkpoint could not be written ({' '.join(str(error).split())[:200]}); what was "
                f"there of it is removed. Earlier checkpoints are intact: make room ({sizes}) and run the same command "
                f"again."
            ) from error
        finally:
            self.args.save_total_limit = limit

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: this process's weights in fp32 and what its optimizer keeps."""
        weights = sum(4 * parameter.numel() for parameter in self.draft.parameters() if parameter.requires_grad)
        states = getattr(self.optimizer, "state", {}).values()
        return weights + sum(kept.nbytes for state in states for kept in state.values() if isinstance(kept, Tensor))

    def save_state(self) -> None:
        """The Trainer's, whole or not at all."""
        if self.args.should_save:
            with replacing(Path(str(self.args.output_dir)) / "trainer_state.json") as temporary:
                self.state.save_to_json(str(temporary))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            final = folder == Path(self.args.output_dir or ".")
            weights = _own_names(state_dict or {})
            save_draft(self.draft, folder, dtype=self.save_dtype if final else torch.float32, weights=weights)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the weights (or may)."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def gathered_weights(self) -> dict[str, Tensor]:
        """The head's weights under their own names, whole; on rank 0 where they are sharded. Every rank must ask."""
        if self.sharded:
            state = _own_names(self.accelerator.get_state_dict(self.model_wrapped) or {})
            buffers = dict(self.draft.named_buffers())
            return {name: tensor for name, tensor in state.items() if name not in buffers}
        return {name: parameter.detach() for name, parameter in self.draft.named_parameters()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_head(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint
        self.load_head(Path(self.state.best_model_checkpoint))

    def load_head(self, folder: Path) -> None:
        """Take the weights of a saved head or checkpoint (not while the model is sharded)."""
        self.evaluated = None
        load_weights(self.draft, folder)


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of what is trained, as the draft names it."""
    return {key.removeprefix("draft."): value for key, value in state.items()}
