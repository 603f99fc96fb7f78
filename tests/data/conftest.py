"""Tiny byte-level tokenizers with the control tokens of a family: real fast tokenizers, built in a millisecond."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(control tokens, template, eos, merges=, words=): one token per byte, plus what is asked for."""

    def make(
        control: Sequence[str] = CHATML, template: str | None = CHATML_TEMPLATE, eos: str | None = "<|im_end|>",
        merges: Sequence[tuple[str, str]] = (), words: Sequence[str] = (),
    ) -> PreTrainedTokenizerFast:  # fmt: skip
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
        backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in control])
        backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template)

    return make


@pytest.fixture
def target_dir(make_tokenizer, tmp_path: Path) -> Path:
    """A folder with a ChatML tokenizer and the eos of its model: all that the data stage needs of a target."""
    folder = tmp_path / "target"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows(rows, name): JSON lines; a str stands for a line as it is."""

    def write(rows: Sequence[dict | str], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages from texts: user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="session")
def talk() -> Callable[..., list[dict]]:
    return turns
