"""The live source: the target in this process turns samples into records.

One sample per forward pass, so a record depends on its sample alone: not on batch size, order or neighbours. That is
what makes stored and live training the same, bit for bit; on long samples it costs nothing, since a few hundred
tokens already fill the matrix units.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fledge.data.tokenize import Sample
from fledge.target.model import Target
from fledge.target.record import TargetRecord


class LiveSource:
    """Records made on demand."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]:
        """One record per sample, in order."""
        return map(self.record, samples)

    def record(self, sample: Sample) -> TargetRecord:
        """Run the target over one sample. Tensors stay on the target's device."""
        device = self.target.device
        input_ids = sample.input_ids.to(device)
        if sample.model_inputs:
            position_ids = self.target.positions(input_ids, sample.model_inputs)
            beside: dict[str, Any] = dict(sample.model_inputs)
            output = self.target.forward(input_ids[None], position_ids=position_ids[..., None, :], **beside)
        else:
            assert not sample.images, f"{sample.id}: its pixels were not loaded (TokenizedData.loaded)"
            position_ids = torch.arange(len(input_ids), device=device)
            output = self.target.forward(input_ids[None])
        assert output.tap_hidden is not None
        return TargetRecord(
            sample_id=sample.id,
            input_ids=input_ids,
            loss_mask=sample.loss_mask.to(device),
            position_ids=position_ids,
            tap_hidden=output.tap_hidden[0].clone(),  # clones: plain tensors that autograd may save
            last_hidden=output.last_hidden[0].clone(),
        )
