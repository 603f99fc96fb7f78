"""Block drafts as folders: config.json + model.safetensors, in the names that engines read.

    fc.weight  hidden_norm.weight  layers.{i}.*  norm.weight
    [markov_head.*]  [confidence_head.*]  [lm_head.weight  d2t  t2d]

Embedding and, with a whole vocabulary, the head are the target's and not in the file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.drafters.base import DrafterFiles
from fledge.drafters.dspark.config import BlockConfig, from_json, is_block_document
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.head_files import WEIGHTS, check_tensors, match_target, read_tensors
from fledge.drafters.layer_config import HINT, JSON
from fledge.parsing import read_json
from fledge.target.model import Target


@dataclass(frozen=True)
class BlockHead:
    """A block draft without its target: a config and tensors in our names."""

    config: BlockConfig
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["fc.weight"].dtype


def read_block(folder: Path) -> BlockHead:
    """A block draft of ours, complete and consistent."""
    head = BlockHead(from_json(folder / "config.json"), read_tensors(folder / WEIGHTS))
    check_block(head, folder)
    return head


def check_block(head: BlockHead, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, finite, d2t and t2d each other's inverse."""
    check_tensors(head.tensors, expected_shapes(head.config), head.config, folder, "a block draft")
    if not head.config.full_vocab:
        check_vocab(head.tensors["d2t"], head.tensors["t2d"], source=str(folder))


def expected_shapes(config: BlockConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete block draft, read off the module itself."""
    with torch.device("meta"):
        nothing = torch.empty(config.vocab_size, config.hidden_size)
        model = BlockDraft(config, nothing, nothing)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not config.full_vocab:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def read_block_draft(name: str) -> DrafterFiles | None:
    """The block draft in this folder, for the registry of drafters; None where there is none."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return None
    if not is_block_document(read_json(folder / "config.json", JSON, hint=HINT)):
        return None
    head = read_block(folder)
    return DrafterFiles(head.config.tap_layers, True, lambda target: bind_block(head, target, folder))


def bind_block(head: BlockHead, target: Target, folder: Path) -> BlockDraft:
    """A block draft that was read from `folder`, ready to run with its target."""
    match_target(head.config, target.embedding_weight, folder)
    model = BlockDraft(head.config, target.embedding_weight, target.head_weight)
    model.load_state_dict(head.tensors, strict=False)
    return model.to(target.embedding_weight.device, target.embedding_weight.dtype).eval()
