"""What `fledge train` asks of a kind of draft: a row for every value of --draft_type.

The rest of training knows batches, losses and folders, and asks here for all that depends on the draft's network.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from fledge.drafters.bound_head import BoundHead
from fledge.drafters.training import DraftModule
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainSettings
from fledge.train.block import BlockKind
from fledge.train.eagle import EagleKind
from fledge.train.settings import DraftSettings
from fledge.train.sources import Source

Records = Callable[[], Sequence[TargetRecord]]


class TrainingKind(Protocol):
    """One kind of draft to train."""

    def check(self, args: DraftSettings) -> None:
        """Look at what its flags name before a target is loaded."""
        ...

    def make(self, args: DraftSettings, source: Source, first: Records) -> BoundHead:
        """A fresh draft, or one continued from --init-from; `first` gives a few records to start it by."""
        ...

    def learning_rate(self, hidden_size: int) -> float:
        """Where none is given."""
        ...

    def module(self, draft: BoundHead, args: TrainSettings, source: Source) -> DraftModule:
        """What the Trainer optimises."""
        ...


KINDS: dict[str, TrainingKind] = {
    "eagle3": EagleKind("eagle3"),
    "eagle3.1": EagleKind("eagle3.1"),
    "dflash": BlockKind("dflash"),
    "dspark": BlockKind("dspark"),
}
