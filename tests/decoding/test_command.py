"""fledge decode: streams text, says what the head was worth, refuses what cannot be."""

import io
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_draft, tiny_model, tiny_target

from fledge.cli import main
from fledge.decoding.command import Stream, speed_line
from fledge.decoding.records import Generation
from fledge.draft.checkpoint import save_draft

TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}<assistant> "


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny target with a word tokenizer and a chat template, and a head for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<pad>", "<eos>", "<user>", "<assistant>", "<system>"]
    vocab = {word: index for index, word in enumerate(words + [f"w{index}" for index in range(7, VOCAB)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    target, head = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("head")
    fast.save_pretrained(target)
    tiny_model("llama").save_pretrained(target)
    save_draft(tiny_draft(tiny_target("llama")), head, dtype=torch.float32)
    return target, head


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["decode", *map(str, words), "--device", "cpu"])
    return int(caught.value.code or 0)


def test_decode_compares_and_agrees(folders, capsys):
    target, head = folders
    words = ("--target", target, "--draft", head, "--prompt", "w20 w30", "--max-new-tokens", 12, "--compare")
    assert run(*words, "--total-token", 8, "--depth", 2, "--top-k", 3) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split()) > 3
    assert "speculative: " in shown.err and "tau " in shown.err and "tok/s" in shown.err
    assert "plain: " in shown.err and "speed-up: " in shown.err and "outputs identical" in shown.err


def test_without_a_head_it_decodes_plainly_the_same_text(folders, capsys):
    target, head = folders
    common = ("--target", target, "--prompt", "w20 w30", "--system", "w9", "--max-new-tokens", 12)
    assert run(*common) == 0
    alone = capsys.readouterr()
    assert run(*common, "--draft", head) == 0
    assert capsys.readouterr().out == alone.out and "tau" not in alone.err


def test_sampling_says_that_draws_differ(folders, capsys):
    target, head = folders
    sampled = ("--temperature", 1, "--seed", 3, "--compare", "--raw")
    assert run("--target", target, "--draft", head, "--prompt", "w20", "--max-new-tokens", 5, *sampled) == 0
    assert "both follow the target's law" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--draft", "/nowhere"), "/nowhere/config.json: no such file"),
        (("--raw", "--system", "w9"), "--system has no place"),
        (("--depth", -1), "depth >= 0"),
        (("--top-p", 2), "top_p=2.0"),
        (("--max-new-tokens", 0), "max_new_tokens=0"),
    ],
)
def test_what_cannot_be_is_one_line(folders, capsys, words, message):
    assert run("--target", folders[0], "--prompt", "w20", *words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


class Bytes:
    """A tokenizer of bytes: characters beyond ASCII take several tokens."""

    def decode(self, token_ids, skip_special_tokens):
        return bytes(token_ids).decode(errors="replace")


def test_a_split_character_waits_for_its_last_token():
    out = io.StringIO()
    stream = Stream(Bytes(), out)
    euro = list("€".encode())
    stream.write([65, euro[0]])
    assert out.getvalue() == "A"
    stream.write(euro[1:])
    assert out.getvalue() == "A€"
    stream.write(euro[:1])
    stream.close()
    assert out.getvalue() == "A€\ufffd\n"


def test_kept_drafts_are_green_on_a_terminal():
    out = io.StringIO()
    out.isatty = lambda: True
    Stream(Bytes(), out).write([65, 66])
    assert out.getvalue() == "\033[32mA\033[0mB"


def test_one_token_has_no_tau():
    line = speed_line("speculative", Generation([3], [], 6, "stop", 0.05, 0.0, {}, num_forwards=0))
    assert line == "speculative: 1 tokens, ended at a stop token, 0.0 tok/s, first token after 50 ms"
