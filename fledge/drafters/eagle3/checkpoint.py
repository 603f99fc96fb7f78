"""Draft heads as folders: config.json + model.safetensors in the EAGLE names, and everything that must hold on loading.

    fc.weight  midlayer.*  norm.weight  lm_head.weight  [fc_norm.{i}.weight]  [d2t  t2d]  [embed_tokens.weight]

A head that loads here is complete, finite and belongs to the target: a missing or unknown tensor, a broken d2t/t2d
pair, NaN weights or another vocabulary are errors, because every one of them decodes "fine" at an acceptance of zero.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fledge.drafters.base import DrafterFiles
from fledge.drafters.eagle3.config import DraftConfig, to_json
from fledge.drafters.eagle3.head import EMBEDDING, WEIGHTS, Head, read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.errors import UserError, naming
from fledge.outputs import staged, write_json


def save_draft(
    model: DraftModel, folder: Path, *, dtype: torch.dtype = torch.bfloat16, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the head so that fledge, vLLM and SGLang load it. An earlier head there is replaced as a whole.

    `weights` replaces the model's own parameters where they are sharded over ranks and were gathered elsewhere.
    """
    tensors = draft_tensors(model, dtype)
    gathered = {name: weight for name, weight in (weights or {}).items() if name in tensors}
    tensors |= {name: weight.to("cpu", tensors[name].dtype).contiguous() for name, weight in gathered.items()}
    with staged(folder) as building:
        with naming(folder / WEIGHTS, needed_bytes=sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, str(building / WEIGHTS), metadata={"format": "pt"})
        write_json(building / "config.json", to_json(model.config, dtype=str(dtype).removeprefix("torch.")))


def draft_tensors(model: DraftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's tensors: trained weights in `dtype`, d2t and t2d unless the vocabulary is whole."""
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    if not model.config.full_vocab:
        tensors |= {"d2t": model.d2t.cpu().contiguous(), "t2d": model.t2d.cpu().contiguous()}
    if model.owns_embedding:
        tensors[EMBEDDING] = model.embedding.to("cpu", dtype).contiguous()
    return tensors


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
    return DrafterFiles(head.config.tap_layers, True, lambda embedding: bind_head(head, embedding, folder))


def bind_head(head: Head, embedding: Tensor, folder: Path, *, dtype: torch.dtype | None = None) -> DraftModel:
    """A head that was read from `folder`, ready to run with the target whose input embedding (V, H) is given."""
    _match_target(head.config, embedding, folder)
    model = DraftModel(head.config, embedding)
    model.load_state_dict(head.tensors, strict=False)
    if EMBEDDING in head.tensors and not same_embedding(head.tensors[EMBEDDING], embedding):
        model.own_embedding(head.tensors[EMBEDDING].to(embedding))
    return model.to(embedding.device, dtype or embedding.dtype).eval()


def same_embedding(theirs: Tensor, target: Tensor) -> bool:
    """Whether a head's embedding (V, H) is a copy of its target's, in the coarser of the two dtypes."""
    coarser = min(theirs.dtype, target.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(theirs.to(target.device, coarser), target.to(coarser))


def _match_target(config: DraftConfig, embedding: Tensor, folder: Path) -> None:
    vocab_size, hidden_size = embedding.shape
    if config.vocab_size != vocab_size or config.hidden_size != hidden_size:
        raise UserError(
            f"{folder}: the head is for a target with vocabulary {config.vocab_size} and hidden size "
            f"{config.hidden_size}; this target has {vocab_size} and {hidden_size}. Use the head's own target, or "
            f"train a head for this one."
        )
