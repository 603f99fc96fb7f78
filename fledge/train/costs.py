"""What one training step of a draft costs, for every kind of draft: what `fledge plan` asks."""

from dataclasses import dataclass
from typing import Protocol

from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.layer_config import LayerConfig
from fledge.train.block_memory import block_flop_per_step, block_parameters, block_step_memory
from fledge.train.memory import StepMemory, flop_per_step, num_parameters, step_memory


class StepCosts(Protocol):
    """A draft's costs; `share` is that of the tokens that are the target's own."""

    @property
    def config(self) -> LayerConfig: ...

    @property
    def parameters(self) -> int:
        """Trained weights."""
        ...

    def memory(self, sequences: int, length: int, share: float, *, bf16: bool, state_bytes: int, device_type: str
    ) -> StepMemory:  # fmt: skip
        """One step over so many sequences."""
        ...

    def flop(self, length: int, share: float) -> int:
        """Matrix products of a step for a sequence."""
        ...


@dataclass(frozen=True)
class EagleCosts:
    """An EAGLE-3 head's."""

    config: DraftConfig
    ttt_steps: int
    survival: float
    recompute: bool
    processes: int  # that a sequence is divided among

    @property
    def parameters(self) -> int:
        return sum(num_parameters(self.config).values())

    def memory(self, sequences: int, length: int, share: float, *, bf16: bool, state_bytes: int, device_type: str
    ) -> StepMemory:  # fmt: skip
        rows = sequences * length
        return step_memory(
            self.config, rows=rows, active_rows=self._active(rows, share) // self.processes, ttt_steps=self.ttt_steps,
            bf16=bf16,
            recompute=self.recompute, state_bytes=state_bytes, device_type=device_type, survival=self.survival,
        )  # fmt: skip

    def flop(self, length: int, share: float) -> int:
        return flop_per_step(
            self.config, rows=length, active_rows=self._active(length, share), taught=round(length * share),
            ttt_steps=self.ttt_steps, survival=self.survival,
        )  # fmt: skip

    def _active(self, rows: int, share: float) -> int:
        return min(rows, round(rows * share) + self.ttt_steps)


@dataclass(frozen=True)
class BlockCosts:
    """A block draft's."""

    config: BlockConfig
    num_anchors: int

    @property
    def parameters(self) -> int:
        return sum(block_parameters(self.config).values())

    def memory(self, sequences: int, length: int, share: float, *, bf16: bool, state_bytes: int, device_type: str
    ) -> StepMemory:  # fmt: skip
        return block_step_memory(
            self.config, rows=sequences * length, blocks=sequences * self._blocks(length, share), bf16=bf16,
            state_bytes=state_bytes, device_type=device_type,
        )  # fmt: skip

    def flop(self, length: int, share: float) -> int:
        return block_flop_per_step(
            self.config, rows=length, blocks=self._blocks(length, share), taught=round(length * share)
        )

    def _blocks(self, length: int, share: float) -> int:
        return min(self.num_anchors, round(length * share))
