"""`fledge inspect` of a block draft: its files, then every way to read them that its trainer may have meant, by tau.

A file may leave the block layout unsaid or name its taps by the other convention. Nothing then fails; the draft is only
accepted once in a hundred tokens (vLLM issue 56792). So both layouts and the taps one layer up and down are tried on
answers of the target, and the one that explains the draft is named.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fledge import provenance
from fledge.console import say, show_table
from fledge.doctor.readings import RecordedAnswers
from fledge.drafters.batch import pack
from fledge.drafters.dspark.checkpoint import BlockHead
from fledge.drafters.dspark.config import BlockConfig, to_json
from fledge.drafters.dspark.foreign import read_any_block
from fledge.drafters.dspark.loss import BlockLossSettings
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.training import BlockModule
from fledge.errors import UserError
from fledge.export.block_layouts import BLOCK_LAYOUTS
from fledge.export.convert import write_head
from fledge.outputs import Output, written

if TYPE_CHECKING:
    from fledge.target.model import Target

EVERY_ANCHOR = 1 << 20
CLEARLY = 1.5  # times as many accepted drafts: readings that are a layer or a slot off accept next to nothing
LEAST_GAIN = 0.1  # accepted drafts a round
USELESS_TAU = 1.05


@dataclass(frozen=True)
class BlockReading:
    """One way to understand a block draft's files, and the tokens per target forward that a greedy chain has so."""

    label: str
    config: BlockConfig
    tau: float = 0.0


def block_readings(config: BlockConfig, num_layers: int) -> Iterator[BlockReading]:
    """As the files say, then the other block layout and the taps one layer up and down, and both together."""
    for from_anchor in (config.sample_from_anchor, not config.sample_from_anchor):
        for shift in (0, 1, -1):
            taps = tuple(layer + shift for layer in config.tap_layers)
            if taps[0] < 1 or taps[-1] >= num_layers or (not from_anchor and config.block_size < 2):
                continue
            changed = dataclasses.replace(config, sample_from_anchor=from_anchor, tap_layers=taps)
            label = f"sample_from_anchor {from_anchor}, taps {list(taps)}"
            yield BlockReading("as the files say" if changed == config else label, changed)


def layers_of(readings: Sequence[BlockReading]) -> tuple[int, ...]:
    """Every layer that a reading taps."""
    return tuple(sorted({layer for reading in readings for layer in reading.config.tap_layers}))


@torch.no_grad()
def measured(head: BlockHead, reading: BlockReading, answers: RecordedAnswers) -> BlockReading:
    """The reading with its tau, over the drafts that both block layouts have."""
    target = answers.target
    draft = BlockDraft(reading.config, target.embedding_weight, target.head_weight)
    draft.load_state_dict(head.tensors, strict=False)
    draft = draft.to(target.device, target.dtype).eval()
    module = BlockModule(draft, target.head, BlockLossSettings(), num_anchors=EVERY_ANCHOR)
    columns = torch.tensor([target.tap_layers.index(layer) for layer in reading.config.tap_layers])
    records = [
        dataclasses.replace(record, tap_hidden=record.tap_hidden[:, columns.to(record.tap_hidden.device)])
        for record in answers.records
    ]
    found = module(pack(records))
    common = max(1, reading.config.block_size - 1)
    right, tried = found.prefix_hits[:common].double(), found.trained[:common].clamp_min(1)
    return dataclasses.replace(reading, tau=1 + float((right / tried).sum()))


def best_reading(head: BlockHead, answers: RecordedAnswers, num_layers: int) -> list[BlockReading]:
    """All readings measured, as the files say first; then, where one explains the draft clearly better, that one."""
    tried = [measured(head, reading, answers) for reading in block_readings(head.config, num_layers)]
    best = max(tried, key=lambda reading: reading.tau)
    gained, stated = best.tau - 1, tried[0].tau - 1
    return [*tried, best if gained > max(CLEARLY * stated, stated + LEAST_GAIN) else tried[0]]


def inspect_block(
    folder: Path, target: "Target | None", prompts: Sequence[Sequence[int]], max_new_tokens: int, *, fix: Path | None,
    repaired: Output, overwrite: bool,
) -> None:  # fmt: skip
    """Show a block draft and how its target explains it. `target` taps whatever `layers_of` says."""
    head = read_any_block(folder)
    fields = [[key, value] for key, value in to_json(head.config).items() if value is not None]
    show_table(str(folder), ["field", "value"], fields)
    if target is None:
        say("give --target to try its block layout and its taps")
        return
    answers = RecordedAnswers(target, prompts, max_new_tokens)
    *tried, best = best_reading(head, answers, target.num_layers)
    show_table("tried on the target's greedy answers", ["reading", "tau"],
               [[reading.label, f"{reading.tau:.3f}"] for reading in tried])  # fmt: skip
    if best.tau < USELESS_TAU:
        raise UserError(f"{folder}: tau is {best.tau:.2f} under every reading of the files: it drafts nothing. Another "
                        f"target's draft, or an untrained one.")  # fmt: skip
    if fix is not None:
        with written(fix, repaired, overwrite=overwrite) as building:
            write_head(dataclasses.replace(head, config=best.config), building, BLOCK_LAYOUTS["vllm"], "")
            provenance.write(building / "repair.json", source=str(folder), target=target.name, changes=[best.label])
        say(f"repaired copy: {fix} ({best.label})")
    elif best.config != head.config:
        raise UserError(
            f"{folder}: read as its files say, tau is {tried[0].tau:.2f}; with {best.label} it is {best.tau:.2f}. "
            f"`--fix OUT` writes a copy that says so."
        )
    else:
        say("no other reading of the files explains the draft better")
