"""fledge decode: streams text, says what the head was worth, refuses what cannot be."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_draft, tiny_model, tiny_target

from fledge import provenance
from fledge.cli import main
from fledge.commands.answering import Stream, speed_line
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.records import Generation
from fledge.decoding.tree_profile import NAME, TreeProfile, write_profile
from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.drafters.tree import TreeShape

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


def run(*words: object, command: str = "decode") -> int:
    with pytest.raises(SystemExit) as caught:
        main([command, *map(str, words), "--device", "cpu"])
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


def test_fixed_shapes_stream_the_same_text(folders, capsys):
    target, head = folders
    common = ("--target", target, "--draft", head, "--prompt", "w20 w30", "--max-new-tokens", 12)
    assert run(*common, "--shapes", "exact") == 0
    exact = capsys.readouterr().out
    assert run(*common, "--shapes", "fixed", "--compare", "--profile") == 0
    shown = capsys.readouterr()
    assert shown.out == exact and "outputs identical" in shown.err and "verify" in shown.err


def test_several_prompts_at_once(folders, capsys):
    """Every answer is the one its prompt gets alone, in order."""
    target, head = folders
    common, prompts = ("--target", target, "--draft", head, "--max-new-tokens", 12), ("w20 w30", "w40", "w50 w60 w70")
    alone = []
    for text in prompts:
        assert run(*common, "--prompt", text) == 0
        alone.append(capsys.readouterr().out)
    for more in (("--batch-size", 2, "--compare"), ("--shapes", "fixed"), ()):
        assert run(*common, "--prompt", *prompts, *more) == 0
        shown = capsys.readouterr()
        assert shown.out == "".join(alone) and "3 prompts, " in shown.err and "tok/s in all" in shown.err
        if "--compare" in more:
            assert "speed-up of all: " in shown.err and shown.err.count("outputs identical") == 3


def test_prompt_lookup_needs_no_head(folders, capsys):
    words = (
        "--target",
        folders[0],
        "--draft",
        "lookup",
        "--prompt",
        "w20 w30 w20",
        "--max-new-tokens",
        40,
        "--compare",
    )
    assert run(*words) == 0
    shown = capsys.readouterr().err
    assert "outputs identical" in shown and "tau" in shown


def test_what_reads_no_states_asks_for_no_layers(folders, capsys, tmp_path):
    """Three layers are too few for a head's usual taps, which stopped plain decoding and prompt lookup, too."""
    target = tmp_path / "shallow"
    shutil.copytree(folders[0], target)
    tiny_model("llama", num_hidden_layers=3).save_pretrained(target)
    shown = []
    for draft in ((), ("--draft", "lookup")):
        assert run("--target", target, *draft, "--prompt", "w20 w30 w20", "--max-new-tokens", 12) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_a_seed_decides_the_text_with_a_head_and_without(folders, capsys):
    words = ("--target", folders[0], "--prompt", "w20 w30", "--max-new-tokens", 12, "--temperature", 1, "--seed", 5)
    texts = []
    for more in ((), ("--draft", folders[1]), ("--draft", "lookup")):
        assert run(*words, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


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
        (("--draft", "lookup", "--shapes", "fixed"), "the drafter reads the tokens on the host"),
        (("w30", "--image", "a.png"), "--image belongs to one prompt; --prompt has 2"),
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


@pytest.mark.parametrize("shapes", ["exact", "fixed"])
def test_a_stop_string_ends_the_answer_and_is_not_shown(folders, capsys, shapes):
    target, head = folders
    common = ("--target", target, "--max-new-tokens", 12, "--shapes", shapes)
    assert run(*common, "--prompt", "w20 w30") == 0
    said = capsys.readouterr().out.split()
    stop = f"{said[4]} {said[5]}"  # two words, so it spans tokens
    expected = " ".join(said).split(stop)[0].split()
    drafted = ("--draft", head, "--total-token", 8, "--depth", 2, "--top-k", 3)
    assert run(*common, "--prompt", "w20 w30", *drafted, "--stop", stop, "never", "--compare") == 0
    shown = capsys.readouterr()
    assert shown.out.split() == expected and "outputs identical" in shown.err
    assert f"speculative: {len(expected) + 2} tokens, ended at a stop," in " ".join(shown.err.split())
    assert run(*common, "--prompt", "w20 w30", "w8", "--batch-size", 2, "--stop", stop) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == expected


def test_kept_drafts_are_green_on_a_terminal():
    out = io.StringIO()
    out.isatty = lambda: True
    Stream(Bytes(), out).write([65, 66])
    assert out.getvalue() == "\033[32mA\033[0mB"


def test_one_token_has_no_tau():
    line = speed_line("speculative", Generation([3], [], 6, "stop", 0.05, 0.0, {}, num_forwards=0))
    assert line == "speculative: 1 tokens, ended at a stop, 0.0 tok/s, first token after 50 ms"


def write_tree_profile(head: Path, target: Path) -> None:
    costs = {"verify_s": {str(n): 1.0 + 0.01 * n for n in (2, 8, 16, 32)}, "overhead_s": 0.01,
             "draft_s": {f"3x{level}": 0.05 * level for level in range(1, 9)}}  # fmt: skip
    write_profile(head / NAME, TreeProfile(
        tree=TreeShape(8, 2, 3), tau=1.5, tokens_per_s=1.2, plain_tokens_per_s=1.0, temperature=0.0, measured={},
        curve=[], costs=costs, hardware=provenance.hardware(),
    ))  # fmt: skip


def test_adaptive_drafting_and_its_profile(folders, capsys, tmp_path):
    target, original = folders
    head = shutil.copytree(original, tmp_path / "head")
    words = ("--target", target, "--draft", head, "--prompt", "w20 w30", "--max-new-tokens", 40, "--compare",
             "--adaptive", "--total-token", 8, "--depth", 2, "--top-k", 3)  # fmt: skip
    assert run(*words) == 1 and "no tree profile" in capsys.readouterr().err
    write_tree_profile(head, target)
    assert run(*words, "--profile") == 0
    shown = capsys.readouterr().err
    assert "outputs identical" in shown and "GB/s" in shown and "verify" in shown
    assert run(*words, "--shapes", "fixed") == 1
    assert "--adaptive decides every tree on the host" in " ".join(capsys.readouterr().err.split())
    assert run(*words, "--prompt", "w20", "w30", "--batch-size", 2) == 0
    assert "one prompt after another: --adaptive decides for one sequence at a time" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run("--target", target, "--prompt", "w20", "--adaptive") == 1
    assert "--adaptive adapts the draft tree" in capsys.readouterr().err


def test_chat_keeps_the_conversation(folders, capsys, monkeypatch):
    """Turns from a pipe: the second sees the first, /reset forgets; the same text as decoding the whole."""
    target, head = folders
    monkeypatch.setattr("sys.stdin", io.StringIO("w20 w30\n\nw40\n/reset\nw20 w30\n/exit\nw50\n"))
    asked: list[list[str]] = []
    real = ChatTemplate.prompt_ids

    def noted(self, messages):
        asked.append([message["role"] for message in messages])
        return real(self, messages)

    monkeypatch.setattr(ChatTemplate, "prompt_ids", noted)
    assert run("--target", target, "--draft", head, "--max-new-tokens", 8, "--system", "w9", command="chat") == 0
    shown = capsys.readouterr()
    first, second, third = shown.out.splitlines()
    assert first == third and second and shown.err.count("tok/s") == 3
    assert asked == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_chat_helps(folders, capsys, monkeypatch):
    """`/help` was a message to the model."""
    target, head = folders
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/hepl\n/etc/hosts\n"))
    assert run("--target", target, "--draft", head, "--max-new-tokens", 4, command="chat") == 0
    said = capsys.readouterr().err
    assert said.count("/reset begins a new conversation") == 3  # the greeting, /help and /hepl
    assert "/hepl: no such command" in said and said.count("tok/s") == 1  # /etc/hosts is a message


def test_chat_survives_what_one_turn_does_wrong(folders, capsys, monkeypatch):
    target, head = folders
    monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(["w20"] * 600) + "\nw20\n"))
    assert run("--target", target, "--draft", head, "--max-new-tokens", 4, command="chat") == 0
    shown = capsys.readouterr()
    assert "Shorten the prompt" in shown.err and shown.err.count("tok/s") == 1


def test_without_a_tree_the_engine_chooses(folders, capsys, monkeypatch, tmp_path):
    """One prompt is drafted for as far as it pays; several at once decode plainly on a CPU."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    target, head = folders
    words = ("--target", target, "--draft", head, "--max-new-tokens", 20, "--compare")
    assert run(*words, "--prompt", "w20 w30") == 0
    assert "outputs identical" in capsys.readouterr().err
    assert run(*words, "--prompt", "w20", "w30", "--batch-size", 2) == 0
    assert "one prompt after another" not in " ".join(capsys.readouterr().err.split())
    assert len(list((tmp_path / "costs").iterdir())) == 1
