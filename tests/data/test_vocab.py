"""The draft vocabulary against a drawn example, and every way its two tensors can disagree."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fledge.data.vocab import build_vocab, check_vocab, control_ids, count_tokens, coverage, vocab_size_of
from fledge.errors import UserError

COUNTS = torch.tensor([5, 0, 9, 0, 7, 1, 0, 3])  # of target ids 0..7


def test_the_most_frequent_ids_ascending_as_offsets():
    """target 0 . 2 . 4 . . . -> draft 0 1 2, offsets 0 1 2."""
    vocab = build_vocab(COUNTS, 8, 3)
    assert vocab.d2t.tolist() == [0, 1, 2] and vocab.target_ids.tolist() == [0, 2, 4]
    assert vocab.t2d.nonzero().flatten().tolist() == [0, 2, 4]
    assert vocab.coverage == 21 / 25
    check_vocab(vocab.d2t, vocab.t2d)


def test_control_tokens_always_belong_to_it():
    vocab = build_vocab(COUNTS, 8, 3, always=[6, 6])
    assert vocab.target_ids.tolist() == [2, 4, 6] and vocab.coverage == 16 / 25


def test_equal_counts_go_to_the_lower_id():
    assert build_vocab(torch.zeros(8, dtype=torch.int64), 8, 3).target_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [None, 8, 100])
def test_the_whole_vocabulary_is_the_identity(size):
    vocab = build_vocab(COUNTS, 8, size)
    assert vocab.d2t.tolist() == [0] * 8 and vocab.t2d.all() and vocab.coverage == 1


def test_a_padded_embedding_is_wider_than_the_tokenizer():
    assert len(build_vocab(COUNTS, 10, 3).t2d) == 10
    assert build_vocab(torch.nn.functional.pad(COUNTS, (0, 4)), 8, 3).target_ids.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("size", "always", "vocab_size", "message"),
    [
        (2, [1, 3, 5], 8, "draft_vocab_size=2 is too small: 3 stop and control tokens"),
        (0, [], 8, "draft_vocab_size=0 is too small"),
        (3, [8], 8, "control token id 8 is outside the target's vocabulary of 8"),
        (3, [], 6, "the data holds token id 7, the target's vocabulary ends at 5"),
    ],
)
def test_impossible_vocabularies(size, always, vocab_size, message):
    with pytest.raises(UserError, match=message):
        build_vocab(COUNTS, vocab_size, size, always)


def test_coverage_grows_with_the_size():
    assert coverage(COUNTS, [1, 2, 5, 32000]) == {1: 9 / 25, 2: 16 / 25, 5: 1.0, 32000: 1.0}


def test_counting_and_control_ids():
    counts = count_tokens(torch.tensor([1, 1, 3]), 5)
    assert counts.tolist() == [0, 2, 0, 1, 0]
    assert control_ids(counts, special_ids=[0, 3, 99], stop_ids=[4]) == (3, 4)


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([0, 2, 4], [1, 0, 1, 0, 1], "draft id 1 maps to target id 3 by d2t but to 2 by t2d .2 of 3 differ.*offsets"),
        ([0, 1], [1, 0, 1, 0, 1], "d2t names 2 tokens, t2d 3"),
        ([0.0, 1.0], [1, 0, 1], "d2t is torch.float32"),
    ],
)
def test_vocabularies_that_disagree_are_named(d2t, t2d, message):
    """The first: target ids stored where offsets belong, the usual mistake."""
    with pytest.raises(UserError, match="head.safetensors: .*" + message):
        check_vocab(torch.tensor(d2t), torch.tensor(t2d, dtype=torch.bool), "head.safetensors")


def test_t2d_must_be_bool():
    with pytest.raises(UserError, match="t2d torch.int64"):
        check_vocab(torch.tensor([0]), torch.tensor([1, 0]))


def test_a_vocabulary_with_gaps_ends_behind_its_largest_id(make_tokenizer):
    """A tokenizer of 258 tokens whose largest id is 300: rows that held that token were rejected."""
    tokenizer = make_tokenizer()
    assert vocab_size_of(tokenizer) == len(tokenizer)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"][-1]["id"] = 300
    document["model"]["vocab"]["<|im_end|>"] = 300
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    assert vocab_size_of(gapped) == 301 > len(gapped)
