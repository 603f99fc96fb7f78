"""A tiny target as a folder on disk, with a byte tokenizer, and conversations for it: what a command line is given."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the quick brown fox sees a lazy dog and runs over hills to find water before night falls again".split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML control tokens behind them."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


def save_target(folder: Path, name: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Model and tokenizer, as `save_pretrained` leaves them."""
    tokenizer = byte_tokenizer()
    size = {"vocab_size": len(tokenizer) + 6, "num_hidden_layers": 8, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(name, seed, **{**size, "max_position_embeddings": 512, **overrides})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_conversations(path: Path, count: int, seed: int = 0, prefix: str = "row") -> Path:
    """Random short conversations with ids."""
    chance = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    rows = [
        {"id": f"{prefix}-{i}", "conversations": [
            {"from": "human", "value": text(1, 6)}, {"from": "gpt", "value": text(2, 14)}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the provenance (it holds times), the marker and the lock (they name the run)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "provenance.json" and not path.name.startswith(".fledge")
    }


def equal_records(a: Any, b: Any) -> bool:
    return a.sample_id == b.sample_id and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "loss_mask", "position_ids", "tap_hidden", "last_hidden")
    )
