"""A target cut over several processes (`tp_plan`): one of them leads, the others compute their share of its passes.

    rank 0    reads the data, announces each sample's tokens, takes the records and writes them
    others    wait for tokens, run the same forward pass, keep nothing

transformers cuts the weights and joins the results inside the layers; taps and the last state are whole on every rank.
"""

from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import Tensor

from fledge.data.tokenize import Sample
from fledge.errors import UserError
from fledge.target.head import TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.target.record import TargetRecord


class LeadingSource:
    """The live source of rank 0."""

    def __init__(self, target: Target, head: TargetHead) -> None:
        """`head`: the whole one; the target's own may be a part of it."""
        self._live = LiveSource(target, head)

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]:
        """One record per sample, in order; the followers stay in step."""
        for sample in samples:
            _announce(sample.input_ids)
            yield self._live.record(sample)


def follow(target: Target) -> None:
    """What every other rank does until rank 0 dismisses it."""
    while (input_ids := _announce(None)) is not None:
        target.forward(input_ids.to(target.device)[None])


def dismiss() -> None:
    """Rank 0 is done."""
    _announce(None)


def _announce(input_ids: Tensor | None) -> Tensor | None:
    """Rank 0's tokens, on every rank."""
    message = [input_ids]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def check_world(world: int, tp_plan: str) -> None:
    """Cutting a target needs the processes to cut it over."""
    if world < 2:
        raise UserError(
            f"--tp-plan {tp_plan} cuts the target over several processes, and this is one. Start it with "
            f"`torchrun --nproc-per-node NUM_GPUS -m fledge extract ...`."
        )
