"""Online training from a target on vLLM servers: hidden states of the next batches are requested while this one trains.

The request of a sample starts when the loader reads it. The loader is a batch ahead, so servers work during the step.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor
from torch.utils.data import Dataset

from fledge.console import say
from fledge.data.tokenize import ChatTemplate, Sample
from fledge.errors import UserError
from fledge.servers.hidden_states import EngineSource, EngineTarget
from fledge.target.record import TargetRecord
from fledge.train.arguments import TrainSettings
from fledge.train.sources import Source, conversations


class PendingSample:
    """A sample whose hidden states have been requested."""

    def __init__(self, sample: Sample, record: "Future[TargetRecord]") -> None:
        self.loss_mask: Tensor = sample.loss_mask  # the loss is divided by a count of these, which is needed first
        self._record = record

    def wait(self) -> TargetRecord:
        return self._record.result()


class PrefetchedSamples(Dataset[PendingSample]):
    """Samples whose hidden states are requested as they are read."""

    def __init__(self, samples: Sequence[Sample], source: EngineSource) -> None:
        self._samples, self._source = samples, source

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> PendingSample:
        sample = self._samples[index]
        return PendingSample(sample, self._source.ask(sample))


def served_source(args: TrainSettings) -> Source:
    """The source for --target-backend vllm."""
    inputs = args.inputs
    if args.trainer.dataloader_num_workers:
        raise UserError(
            "--dataloader_num_workers cannot be used with --target-backend vllm: the requests run in threads of the "
            "training process, several at a time already."
        )
    name, taps = str(inputs.target), args.draft.taps()
    target = EngineTarget.open(
        name, inputs.server, dtype=args.inputs.dtype, tap_layers=taps, folder=inputs.server_folder
    )
    template = ChatTemplate.from_pretrained(
        name, inputs.chat_template_type or None, last_turn_only=inputs.train_last_turn_only, untraced=inputs.untraced,
    )  # fmt: skip
    head = target.ends.head.to(args.trainer.device)
    samples, held_out, counts, always = conversations(inputs, template, head.weight.shape[0])
    say(f"the target runs on {', '.join(target.source.servers)}; here are its embedding, final norm and head")
    return Source(
        train=PrefetchedSamples(samples, target.source),
        eval=PrefetchedSamples(held_out, target.source) if held_out is not None else None,
        to_record=PendingSample.wait,
        counts=counts,
        always=always,
        text_config=target.ends.text_config,
        tap_layers=target.tap_layers,
        embedding=head.embedding,
        head_weight=head.weight,
        teacher_head=head,
        target_name=target.ends.name,
        device=args.trainer.device,
    )
