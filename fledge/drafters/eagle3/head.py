"""A head without its target: a config and tensors in our names, and everything that must hold between the two.

`DraftModel` is a head bound to a target's embedding and ready to run; this is the same head as data, for those who
convert, export, examine or repair it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.drafters.eagle3.config import DraftConfig, from_json
from fledge.drafters.head_files import EMBEDDING, WEIGHTS, check_tensors, read_tensors
from fledge.errors import UserError

__all__ = [
    "EMBEDDING", "WEIGHTS", "Head", "check_head", "check_head_tensors", "expected_shapes", "read_head", "read_tensors",
]  # fmt: skip


FURTHER = re.compile(r"(^|\.)layers\.[1-9]")  # a layer behind the first


@dataclass(frozen=True)
class Head:
    """A head in our names."""

    config: DraftConfig
    tensors: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["fc.weight"].dtype

    @property
    def target_ids(self) -> Tensor:
        """(D,) target ids the head may propose."""
        draft_ids = torch.arange(self.config.draft_vocab_size)
        return draft_ids if self.config.full_vocab else draft_ids + self.tensors["d2t"]


def read_head(folder: Path) -> Head:
    """A head of ours (the EAGLE layout), complete and consistent."""
    head = Head(from_json(folder / "config.json"), renamed(read_tensors(folder / WEIGHTS), further_norm, folder))
    check_head(head, folder)
    return head


def further_norm(name: str) -> str:
    """Our name of the norm before the attention of a layer behind the first: SGLang calls it hidden_norm."""
    return name.replace("hidden_norm", "input_layernorm") if FURTHER.search(name) else name


def renamed(tensors: dict[str, Tensor], name_of: Callable[[str], str], folder: Path) -> dict[str, Tensor]:
    """The tensors of a file under their names here; an error where two of them would be one."""
    found: dict[str, str] = {}
    for name in sorted(tensors):
        if (other := found.setdefault(name_of(name), name)) != name:
            raise UserError(
                f"{folder}: {other} and {name} are both in the file, and one of them is used. Keep the one that the "
                f"head was trained with."
            )
    return {ours: tensors[theirs] for ours, theirs in found.items()}


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete head."""
    size, inner, taps = config.hidden_size, config.intermediate_size, len(config.tap_layers)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, taps * size),
        "midlayer.hidden_norm.weight": (size,),
        "norm.weight": (size,),
        "lm_head.weight": (config.draft_vocab_size, size),
    }
    for number in range(config.num_layers):
        prefix, inputs = (f"layers.{number}", size) if number else ("midlayer", 2 * size)
        shapes |= {
            f"{prefix}.input_layernorm.weight": (size,),
            f"{prefix}.post_attention_layernorm.weight": (size,),
            f"{prefix}.self_attn.q_proj.weight": (q, inputs),
            f"{prefix}.self_attn.k_proj.weight": (kv, inputs),
            f"{prefix}.self_attn.v_proj.weight": (kv, inputs),
            f"{prefix}.self_attn.o_proj.weight": (size, q),
            f"{prefix}.mlp.gate_proj.weight": (inner, size),
            f"{prefix}.mlp.up_proj.weight": (inner, size),
            f"{prefix}.mlp.down_proj.weight": (size, inner),
        }
        if config.qk_norm:
            shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    if config.fc_norm:
        shapes |= {f"fc_norm.{tap}.weight": (size,) for tap in range(taps)}
    if not config.full_vocab:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def check_head(head: Head, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, finite, d2t and t2d each other's inverse."""
    check_head_tensors(head, folder)
    if not head.config.full_vocab:
        check_vocab(head.tensors["d2t"], head.tensors["t2d"], source=str(folder))


def check_head_tensors(head: Head, folder: Path) -> None:
    """Complete, nothing unknown, right shapes, real numbers, finite; a rope that gives frequencies."""
    expected = expected_shapes(head.config)
    if EMBEDDING in head.tensors:
        expected[EMBEDDING] = (head.config.vocab_size, head.config.hidden_size)
    check_tensors(head.tensors, expected, head.config, folder, "an EAGLE-3 head")
