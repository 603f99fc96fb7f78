"""Draft heads as folders: config.json + model.safetensors in the EAGLE names, and everything that must hold on loading.

    fc.weight  midlayer.*  [layers.{n}.*]  norm.weight  lm_head.weight  [fc_norm.{i}.weight]  [d2t  t2d]
    [embed_tokens.weight]

A head that loads here is complete, finite and belongs to the target: a missing or unknown tensor, a broken d2t/t2d
pair, NaN weights or another vocabulary are errors, because every one of them decodes "fine" at an acceptance of zero.
"""

from pathlib import Path

import torch
from torch import Tensor

from fledge.drafters.base import DrafterFiles
from fledge.drafters.eagle3.head import EMBEDDING, Head, read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.head_files import WEIGHTS, draft_tensors, match_target, save_draft
from fledge.errors import UserError
from fledge.target.model import Target

__all__ = ["WEIGHTS", "bind_head", "draft_tensors", "load_draft", "read_draft", "same_embedding", "save_draft"]


def load_draft(folder: str | Path, embedding: Tensor, *, dtype: torch.dtype | None = None) -> DraftModel:
    """Read a head for the target whose input embedding (V, H) is given; it lands on the embedding's device."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. A head is a folder with config.json and {WEIGHTS}.")
    return bind_head(read_head(folder), embedding, folder, dtype=dtype)


def read_draft(name: str) -> DrafterFiles:
    """The head in this folder, for the registry of drafters."""
    folder = Path(name)
    head = read_head(folder)

    def bind(target: Target) -> DraftModel:
        return bind_head(head, target.embedding_weight, folder)

    return DrafterFiles(head.config.tap_layers, True, bind)


def bind_head(head: Head, embedding: Tensor, folder: Path, *, dtype: torch.dtype | None = None) -> DraftModel:
    """A head that was read from `folder`, ready to run with the target whose input embedding (V, H) is given."""
    match_target(head.config, embedding, folder)
    model = DraftModel(head.config, embedding)
    model.load_state_dict(head.tensors, strict=False)
    if EMBEDDING in head.tensors and not same_embedding(head.tensors[EMBEDDING], embedding):
        model.own_embedding(head.tensors[EMBEDDING].to(embedding))
    return model.to(embedding.device, dtype or embedding.dtype).eval()


def same_embedding(theirs: Tensor, target: Tensor) -> bool:
    """Whether a head's embedding (V, H) is a copy of its target's, in the coarser of the two dtypes."""
    coarser = min(theirs.dtype, target.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(theirs.to(target.device, coarser), target.to(coarser))
