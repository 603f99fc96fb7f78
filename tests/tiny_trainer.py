"""A DraftTrainer over a tiny random target, in this process or (as a script) in one of its own.

    python tests/tiny_trainer.py OUTPUT_DIR '{"samples": 16, "max_steps": 8, "die_at": 5, ...}' [OUTPUT_DIR '{...}' ...]

Several pairs are run one after the other in forks, so that imports are paid once; how each ended is printed. As a
script it resumes what lies in OUTPUT_DIR, trains, and leaves `rank-N.pt` with the last weights and the losses.
Keys: samples (how many), longest (tokens of one, not reached), untrainable (one more, which teaches nothing), die_at
(step), die_rank, die_after_s: that rank kills itself so long after that step, in its first life only; file_bytes: no
file may grow beyond; survival: of depths at random; sequence_parallel: processes of a sequence; the rest are
TrainerArguments.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tiny import tiny_config, tiny_target, tiny_vocab
from transformers import TrainerCallback

from fledge.data.tokenize import Sample
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.loss import LossSettings
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.train.arguments import TrainerArguments
from fledge.train.module import TTTModule
from fledge.train.resume import begin, find_checkpoint
from fledge.train.run import leave
from fledge.train.shared_batches import share_of_process
from fledge.train.trainer import DraftTrainer

STEPS = 3


def samples(num: int, *, longest: int = 20, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(num):
        length = int(torch.randint(8, longest, (1,), generator=generator))
        ids = torch.randint(4, 128, (length,), generator=generator)
        mask = torch.arange(length) >= length // 2
        made.append(Sample(f"s{index}", ids, mask))
    return made


def make_trainer(
    folder: Path,
    data: list[Sample],
    *,
    average="sequence",
    eval_data=None,
    survival=1.0,
    run="",
    sequence_parallel=1,
    **overrides,
) -> DraftTrainer:
    target = tiny_target("qwen3")
    torch.manual_seed(0)
    draft = DraftModel(tiny_config(target), target.embedding_weight)
    draft.set_vocab(*tiny_vocab(target.vocab_size, draft.config.draft_vocab_size))
    draft.warm_start_head(target.head_weight)
    settings = {
        "output_dir": str(folder), "learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 6,
        "bf16": False, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "warmup_steps": 1, "seed": 3,
        **overrides,
    }  # fmt: skip
    args = TrainerArguments(**settings)
    module = TTTModule(
        draft, target.head, STEPS, LossSettings(average=average), TargetHead.of(target).rows, survival=survival,
        seed=args.seed, share=share_of_process(args, sequence_parallel),
    )  # fmt: skip
    return DraftTrainer(
        module, args, to_record=LiveSource(target).record, train_dataset=data, eval_dataset=eval_data,
        save_dtype=torch.float32, run=run,
    )  # fmt: skip


def losses(trainer: DraftTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Death(TrainerCallback):
    """SIGKILL to this process, a while after a step has ended: wherever it is then."""

    def __init__(self, step: int, after_s: float) -> None:
        self.step, self.after_s = step, after_s

    def on_step_end(self, args, state, control, **_):  # noqa: D102
        if state.global_step == self.step:
            threading.Thread(target=self.strike, daemon=True).start()

    def strike(self) -> None:
        """Wait, then strike."""
        time.sleep(self.after_s)
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, settings: dict) -> None:
    """Train to the end, or to the death that `settings` ask for."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    data = samples(settings.pop("samples"), longest=settings.pop("longest", 20))
    if settings.pop("untrainable", False):
        data.append(Sample("empty", torch.arange(4, 12), torch.arange(8) == 7))
    die_at, die_rank, after_s = settings.pop("die_at", 0), settings.pop("die_rank", 0), settings.pop("die_after_s", 0.0)
    if (limit := settings.pop("file_bytes", None)) is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run = begin(folder, "auto", False).run if rank == 0 else ""
    trainer = make_trainer(folder, data, use_cpu=True, run=run, **settings)
    if die_at and die_rank == rank and first_life:
        trainer.add_callback(Death(die_at, after_s))
    trainer.train(resume_from_checkpoint=find_checkpoint(folder, "auto"))
    weights = {name: weight.cpu().clone() for name, weight in trainer.gathered_weights().items()}
    torch.save({"weights": weights, "losses": losses(trainer)}, folder / f"rank-{rank}.pt")
    leave(trainer.args.device)


def one_by_one(pairs: list[tuple[Path, dict]]) -> None:
    """Each in a child of its own, whatever became of the one before."""
    for folder, settings in pairs:
        child = os.fork()
        if child == 0:
            try:
                main(folder, settings)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        print(f"{folder.name}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    pairs = [(Path(folder), json.loads(settings)) for folder, settings in zip(words[::2], words[1::2], strict=True)]
    main(*pairs[0]) if len(pairs) == 1 else one_by_one(pairs)
