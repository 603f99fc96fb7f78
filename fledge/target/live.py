"""The live source: the target in this process turns samples into records.

One sample per forward pass, so a record depends on its sample alone: not on batch size, order or neighbours. That is
what makes stored and live training the same, bit for bit; on long samples it costs nothing, since a few hundred
tokens already fill the matrix units.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fledge.data.tokenize import Sample
from fledge.target.fused import fuse
from fledge.target.long_texts import read_text
from fledge.target.model import Target, longrope_limit
from fledge.target.record import TargetRecord, TeacherSummary

WINDOW_BATCHES = 4  # samples of so many batches are looked at together, so that batches hold similar lengths


class LiveSource:
    """Records made on demand."""

    def __init__(
        self, target: Target, head: Callable[[Tensor], Tensor] | None = None, *, prefill_chunk: int = 0
    ) -> None:  # fmt: skip
        """`head`: the target's, where the target's own holds only a part of it. Texts longer than `prefill_chunk`
        tokens are read in parts (0: none)."""
        fuse(target)
        self.target, self.head, self.prefill_chunk = target, head or target.head, prefill_chunk

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]:
        """One record per sample, in order."""
        return map(self.record, samples)

    def record(self, sample: Sample) -> TargetRecord:
        """Run the target over one sample. Tensors stay on the target's device."""
        device = self.target.device
        input_ids = sample.input_ids.to(device, non_blocking=True)
        if sample.model_inputs:
            position_ids = self.target.positions(input_ids, sample.model_inputs)
            beside: dict[str, Any] = dict(sample.model_inputs)
            output = self.target.forward(input_ids[None], position_ids=position_ids[..., None, :], **beside)
        else:
            assert not sample.images, f"{sample.id}: its pixels were not loaded (TokenizedData.loaded)"
            position_ids = torch.arange(len(input_ids), device=device)
            output = read_text(self.target, input_ids, self.prefill_chunk)
        assert output.tap_hidden is not None
        last_hidden, loss_mask = output.last_hidden[0].clone(), sample.loss_mask
        return TargetRecord(
            sample_id=sample.id,
            input_ids=input_ids,
            loss_mask=loss_mask,
            position_ids=position_ids,
            tap_hidden=output.tap_hidden[0].clone(),  # clones: plain tensors that autograd may save
            last_hidden=last_hidden,
            summary=TeacherSummary.of(self.head, last_hidden, loss_mask),
        )


class BatchedSource:
    """Several samples per forward pass, for targets too small to fill a GPU with one.

    Samples of similar length are padded on the right: no token sees what comes after it, so no mask is needed, and a
    record differs from the one-by-one record by rounding alone. Samples with images go alone.
    """

    def __init__(self, target: Target, batch_tokens: int, *, prefill_chunk: int = 0) -> None:
        """`batch_tokens`: most tokens of a pass, padding included; a longer sample goes alone."""
        self._alone, self.batch_tokens = LiveSource(target, prefill_chunk=prefill_chunk), batch_tokens

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]:
        """One record per sample, in order."""
        window: list[Sample] = []
        for sample in samples:
            window.append(sample)
            if sum(len(one.input_ids) for one in window) >= WINDOW_BATCHES * self.batch_tokens:
                yield from self._window(window)
                window = []
        yield from self._window(window)

    def _window(self, samples: Sequence[Sample]) -> Iterator[TargetRecord]:
        lengths = [len(sample.input_ids) if not sample.model_inputs else self.batch_tokens for sample in samples]
        made: dict[int, TargetRecord] = {}
        limit = longrope_limit(getattr(self._alone.target.text_config, "rope_parameters", None))
        for batch in length_batches(lengths, self.batch_tokens, limit):
            made |= zip(batch, self._together([samples[index] for index in batch]), strict=True)
        yield from (made[index] for index in range(len(samples)))

    def _together(self, samples: Sequence[Sample]) -> list[TargetRecord]:
        if len(samples) == 1:
            return [self._alone.record(samples[0])]
        target = self._alone.target
        input_ids = torch.nn.utils.rnn.pad_sequence([sample.input_ids for sample in samples], batch_first=True)
        input_ids = input_ids.to(target.device, non_blocking=True)
        output = target.forward(input_ids)
        assert output.tap_hidden is not None
        records = []
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            last_hidden, loss_mask = output.last_hidden[row, :length].clone(), sample.loss_mask
            record = TargetRecord(
                sample_id=sample.id,
                input_ids=input_ids[row, :length].clone(),
                loss_mask=loss_mask,
                position_ids=torch.arange(length, device=target.device),
                tap_hidden=output.tap_hidden[row, :length].clone(),
                last_hidden=last_hidden,
                summary=TeacherSummary.of(target.head, last_hidden, loss_mask),
            )
            records.append(record)
        return records


def length_batches(lengths: Sequence[int], batch_tokens: int, limit: int | None = None) -> Iterator[list[int]]:
    """Indices of samples to run together: longest first, at most `batch_tokens` with padding, at least one.

    Past `limit` tokens the rope of a whole batch is another (longrope): no batch has samples on both sides of it.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        crosses = limit is not None and batch and lengths[batch[0]] > limit >= lengths[index]
        if batch and (crosses or (len(batch) + 1) * lengths[batch[0]] > batch_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
