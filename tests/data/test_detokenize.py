"""Text of tokens as they arrive: nothing of a stop string is shown, wherever tokens begin and end."""

import pytest
from saved_target import byte_tokenizer

from fledge.data.detokenize import Detokenizer, StopStrings, answer_text
from fledge.errors import UserError


class Letters:
    """A token is one character or several, by its number."""

    pieces = ("a", "b", "c", "bc", "ab", "cd", "<end>")

    def decode(self, token_ids, skip_special_tokens):
        return "".join(self.pieces[token] for token in token_ids if token != 6)

    def get_added_vocab(self):
        return {"<end>": 6}


def pieces(tokenizer, token_ids, stop) -> list[str]:
    """What each token makes certain, and the rest."""
    detokenizer = Detokenizer(tokenizer, stop)
    return [*map(detokenizer.add, token_ids), detokenizer.rest()]


def test_stop_strings_span_tokens_and_are_never_shown():
    """`bca` begins inside one token and ends inside another; `b` alone may be its beginning and waits."""
    stops = StopStrings(Letters(), ("bca", "zz"))
    assert [stops.end_with(ids) for ids in ([0, 3], [4, 2], [4, 2, 0], [0, 3, 4])] == [False, False, True, True]
    assert stops.cut("abcab") == "a" and stops.cut("abc") == "abc"
    assert [stops.certain(text) for text in ("ab", "abc", "abd", "abca", "")] == ["a", "a", "abd", "a", ""]
    assert pieces(Letters(), [4, 5, 4, 2, 0], ("bca",)) == ["a", "bcd", "a", "", "", ""]  # ab cd ab c a
    assert pieces(Letters(), [4, 5, 4, 2], ("bca",)) == ["a", "bcd", "a", "", "bc"], "it was none after all"
    assert answer_text(Letters(), [4, 5, 4, 2, 0], ("bca",)) == "abcda"


def test_the_first_of_several_stop_strings_cuts():
    assert StopStrings(Letters(), ("cd", "bcd")).cut("abcd") == "a"


def test_characters_of_several_tokens():
    """One token per byte: a string of two-byte and four-byte characters is complete with its last byte."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("ein Maß 🦊 mehr")["input_ids"]
    stops = StopStrings(tokenizer, ("ß 🦊",))
    ends = [count for count in range(1, len(ids) + 1) if stops.end_with(ids[:count])]
    assert ends[0] == len("ein Maß 🦊".encode())
    shown = pieces(tokenizer, ids[: ends[0]], ("ß 🦊",))
    assert "".join(shown) == "ein Ma" == answer_text(tokenizer, ids, ("ß 🦊",))
    assert "".join(pieces(tokenizer, ids, ("🦊 x",))) == "ein Maß 🦊 mehr"


def test_only_the_last_tokens_are_looked_at():
    """However long the answer, the window holds a whole stop string of characters of four bytes each."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("x" * 300 + "🦊🦊🦊")["input_ids"]
    stops = StopStrings(tokenizer, ("🦊🦊🦊",))
    assert stops.end_with(ids) and not stops.end_with(ids[:-1])
    assert StopStrings(tokenizer, ("x🦊🦊🦊",)).end_with(ids)


def test_a_control_token_is_a_stop_string():
    """It is left out of the text, so that it would never be found there."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("hi")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert StopStrings(tokenizer, ("<|im_start|>",)).end_with(ids)
    assert not StopStrings(tokenizer, ("<|im_end|>",)).end_with(ids)
    assert answer_text(tokenizer, ids, ("<|im_start|>",)) == "hi"


def test_bad_stop_strings():
    with pytest.raises(UserError, match="is empty"):
        StopStrings(Letters(), ("a", ""))
    with pytest.raises(UserError, match="give the target its tokenizer"):
        StopStrings(None, ("a",))
    assert not StopStrings(None)
