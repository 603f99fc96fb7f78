"""Sequence parallelism as the Trainer sees it: consecutive processes are given the same samples."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from fledge.drafters.sequence_share import Share
from fledge.errors import UserError
from fledge.train.arguments import TrainerArguments


class SharedOrder(Sampler[int]):
    """Every index so often in a row: with batches of one, dealt out in turn, each process of a group gets it."""

    def __init__(self, size: int, copies: int, seed: int | None) -> None:
        """`seed`: of an order that every epoch draws anew, alike on all processes; None: as the data lie."""
        self._size, self._copies, self._seed, self._epoch = size, copies, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says it before each epoch, when it resumes, too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self._size)
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(self._size, generator=generator)
        return iter(order.repeat_interleave(self._copies).tolist())

    def __len__(self) -> int:
        return self._size * self._copies


def share_of_process(args: TrainerArguments, sequence_parallel: int) -> Share | None:
    """This process's share of every sequence; None where each process has sequences of its own."""
    if sequence_parallel == 1:
        return None
    if args.world_size % sequence_parallel:
        raise UserError(
            f"--sequence-parallel {sequence_parallel} needs a multiple of so many processes, and there are "
            f"{args.world_size}. Start it with `torchrun --nproc-per-node N`, or lower --sequence-parallel."
        )
    sizes = {"train": args.per_device_train_batch_size, "eval": args.per_device_eval_batch_size}
    if wrong := next((name for name, size in sizes.items() if size != 1), None):
        raise UserError(
            f"--per_device_{wrong}_batch_size {sizes[wrong]}: with --sequence-parallel a batch is one sequence. Give "
            f"--per_device_{wrong}_batch_size 1, and --gradient_accumulation_steps for more sequences in a step."
        )
    return Share(args.process_index % sequence_parallel, sequence_parallel)
