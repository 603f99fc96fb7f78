"""A stop string ends every way to decode after the token that completes it, wherever tokens and rounds end."""

import functools
import itertools

import pytest
import torch
from saved_target import byte_tokenizer
from tiny import ScriptedDraft, prompt, tiny_model

from fledge.api.speculator import Speculator
from fledge.data.detokenize import StopStrings, answer_text
from fledge.decoding.generate import generate, generate_batch, stream
from fledge.decoding.records import Sampling
from fledge.decoding.requests import RequestState
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

# Characters of one byte and of several, split and joined by tokens.
PIECES = (
    b"a", b"ab", b"ba", b"c\n", b"\nc", b"\xc3", b"\xa9", "é".encode(), b"\xe5\xad", b"\x97", "字 a".encode(),
    b"b\xf0\x9f", b"\xa6\x8a", "🦊 é".encode(), "ß".encode(), "aß".encode(), "éb".encode(),
)  # fmt: skip
NEW, LENGTHS = 24, (8, 3, 20)
GREEDY = Sampling()
OPTIONS = dict(max_new_tokens=NEW, eos_token_ids=())


class Pieces:
    """128 tokens of such bytes."""

    def get_added_vocab(self):
        return {}

    def decode(self, token_ids, skip_special_tokens):
        return b"".join(PIECES[token % len(PIECES)] for token in token_ids).decode("utf-8", "replace")


@functools.cache
def target() -> Target:
    return Target(tiny_model("llama"), Pieces(), name="pieces")


@functools.cache
def plain(length: int, sampling: Sampling = GREEDY) -> list[int]:
    """Without a stop string."""
    return generate(target(), None, prompt(length), sampling=sampling, **OPTIONS).token_ids


def stopped(tokens: list[int], stop: tuple[str, ...]) -> list[int]:
    """The slow truth: the least beginning whose whole text holds a stop string."""
    text = Pieces().decode
    counts = (n for n in range(1, len(tokens) + 1) if any(string in text(tokens[:n], True) for string in stop))
    return tokens[: next(counts, len(tokens))]


def strings_of(tokens: list[int]) -> list[str]:
    """Strings of a text that begin and end in all ways within its tokens, with characters of several bytes."""
    text = Pieces().decode(tokens, True)
    found = [text[first : first + size] for first in range(3, len(text) - 5, 2) for size in (1, 2, 4)]
    return [string for string in found if "\ufffd" not in string]


def ways(sampling: Sampling):
    scripts = [prompt(length) + plain(length, sampling) for length in LENGTHS]
    right = ScriptedDraft(target(), *scripts)
    return [
        (None, TreeShape()), (right, TreeShape(8, 3, 2)), (PromptLookup(), TreeShape(8, 6, 1)),
        (ScriptedDraft(target(), *scripts, wrong=3), TreeShape(6, 4, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("warm", [Sampling(), Sampling(1.0, seed=5)])
def test_every_way_to_decode_stops_where_plain_decoding_would(warm):
    strings = strings_of(plain(8, warm))
    assert any(not string.isascii() for string in strings) and len(strings) >= 9
    expected_ends = set()
    for number, (drafter, tree) in enumerate(ways(warm)):
        for stop in strings[number :: len(strings) // 3]:
            law = Sampling(warm.temperature, seed=warm.seed, stop=(stop, "not to be found"))
            expected = stopped(plain(8, warm), (stop,))
            expected_ends.add(len(expected))
            found = generate(target(), drafter, prompt(8), tree=tree, sampling=law, **OPTIONS)
            assert (found.token_ids, found.finish_reason) == (expected, "stop"), (drafter, stop)
        rounds = stream(target(), drafter, [prompt(8)], tree=tree, sampling=law, **OPTIONS)
        assert list(itertools.chain(*(new for (new,) in rounds))) == expected
    assert len(expected_ends) > 5


@pytest.mark.parametrize("shapes", ["exact", "fixed"])
def test_sequences_of_a_batch_stop_by_themselves(shapes):
    for drafter, tree in ways(GREEDY):
        if isinstance(drafter, PromptLookup) and shapes == "fixed":
            continue
        stop = strings_of(plain(3))[9]
        found = generate_batch(
            target(), drafter, [prompt(length) for length in LENGTHS], tree=tree, batch_size=2, shapes=shapes,
            sampling=Sampling(stop=(stop,)), **OPTIONS,
        )  # fmt: skip
        assert [one.token_ids for one in found] == [stopped(plain(length), (stop,)) for length in LENGTHS]
        assert found[1].finish_reason == "stop"


def test_the_speculator_shows_nothing_of_a_stop_string():
    """Text and stream end before it, in tokens they end behind it."""
    own = Target(tiny_model("llama"), Pieces(), name="pieces")  # the speculator lets go of it
    pair = Speculator(own, ScriptedDraft(own, prompt(8) + plain(8), wrong=4), tree=TreeShape(8, 3, 2))
    for stop in strings_of(plain(8))[2::9][:3]:
        options = dict(max_new_tokens=NEW, stop=stop, eos_token_id=999)
        found = pair.generate(prompt(8), **options)
        whole = Pieces().decode(plain(8), True)
        assert found.text == whole[: whole.index(stop)] == answer_text(Pieces(), found.token_ids, (stop,))
        assert found.token_ids == stopped(plain(8), (stop,)) and found.finish_reason == "stop"
        assert "".join(pair.stream(prompt(8), **options)) == found.text
    assert pair.generate(prompt(8), max_new_tokens=NEW, stop="not to be found", eos_token_id=999).text == whole


def test_stop_strings_are_those_of_transformers():
    """Its StopStringCriteria, over a tokenizer of bytes; the model's own generation_config may ask for them too."""
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=None)
    pair = Speculator(Target(model, tokenizer, name="bytes"), None)
    ids, options = tokenizer("hi")["input_ids"], dict(max_new_tokens=NEW, eos_token_id=None)
    free = tokenizer.decode(pair.generate(ids, **options).token_ids)
    for stop in (free[3:5], free[9:12], free[20]):
        if "\ufffd" in stop:
            continue
        theirs = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
        )  # fmt: skip
        assert pair.generate(ids, stop=[stop], **options).token_ids == theirs[0, len(ids) :].tolist()
        model.generation_config.stop_strings = [stop]
        assert pair.generate(ids, **options).token_ids == theirs[0, len(ids) :].tolist()
        model.generation_config.stop_strings = None


def once_a_round(self: RequestState, tokens: list[int]) -> list[int]:
    """Looks at a round's last token alone."""
    self.stopped |= self._stop_strings.end_with([*self.token_ids, *tokens])
    return tokens


@pytest.mark.parametrize(
    ("owner", "name", "plant"),
    [(StopStrings, "end_with", lambda self, tokens: False), (RequestState, "until_stop_string", once_a_round)],
    ids=["never", "once a round"],
)  # fmt: skip
def test_this_file_notices(owner, name, plant, monkeypatch):
    right = ScriptedDraft(target(), prompt(8) + plain(8))
    answers = []
    for _ in range(2):
        answers.append([
            generate(
                target(), right, prompt(8), tree=TreeShape(8, 3, 2), sampling=Sampling(stop=(stop,)), **OPTIONS
            ).token_ids
            for stop in strings_of(plain(8))[1::8]
        ])  # fmt: skip
        monkeypatch.setattr(owner, name, plant)
    assert answers[0] != answers[1]
