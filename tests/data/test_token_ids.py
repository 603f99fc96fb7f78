"""Rows that hold token ids, as SpecForge, speculators, transformers and servers write them; no template is asked."""

import pytest
import torch

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.data.tokenize import ChatTemplate


def test_token_ids_need_no_template(make_tokenizer):
    template = ChatTemplate(make_tokenizer())
    ids = template.tokenizer.encode("prompt", add_special_tokens=False)
    answer = template.tokenizer.encode("answer<|im_end|>", add_special_tokens=False)
    pair = template.encode(Conversation("c", (), {"prompt_token_ids": ids, "token_ids": answer}))
    flags = [0] * len(ids) + [1] * len(answer)
    mask = template.encode(Conversation("c", (), {"input_ids": ids + answer, "loss_mask": flags}))
    for sample in (pair, mask):
        assert sample.input_ids.tolist() == ids + answer and sample.loss_mask.tolist() == [bool(f) for f in flags]
        assert sample.input_ids.dtype == torch.int64 and sample.loss_mask.dtype == torch.bool


@pytest.mark.parametrize(
    "meta",
    [
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
        {"input_ids": [[5, 6, 7, 8]], "loss_mask": [[0, 0, 1, 1]], "attention_mask": [[1, 1, 1, 1]]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {
            "input_ids": [9, 5, 6, 7, 8, 9],
            "labels": [-100, -100, -100, 7, 8, -100],
            "attention_mask": [0, 1, 1, 1, 1, 0],
        },
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "loss_mask": [False, False, True, True]},
    ],
)
def test_rows_that_other_programs_tokenised(make_tokenizer, meta):
    """SpecForge saves tensors of a batch of one, speculators a loss mask, transformers labels and padding."""
    sample = ChatTemplate(make_tokenizer()).encode(Conversation("c", (), meta))
    assert sample.input_ids.tolist() == [5, 6, 7, 8] and sample.loss_mask.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("meta", "detail"),
    [
        ({"labels": [-100, 7, 8]}, "4 token ids but 3 entries of labels"),
        ({"labels": [6, 7, 8, -100]}, "label 6 at 0 is neither its token 5 nor -100"),
        ({"loss_mask": [0, 0, 2, 1]}, "loss_mask holds 2"),
        ({"loss_mask": [0, 0, 0, 1], "labels": [-100, -100, 7, 8]}, "supervise different tokens"),
        ({"loss_mask": [0, 0, 1, 1], "attention_mask": [1, 0, 1, 1]}, "attention_mask is 0 between tokens"),
    ],
)
def test_rows_whose_masks_make_no_sense(make_tokenizer, meta, detail):
    """Shifted labels would train every token as the one behind it."""
    with pytest.raises(Reject, match=detail):
        ChatTemplate(make_tokenizer()).encode(Conversation("c", (), {"input_ids": [5, 6, 7, 8], **meta}))


@pytest.mark.parametrize(
    ("meta", "reason", "detail"),
    [
        ({"input_ids": [1, 2], "loss_mask": [1]}, "bad token ids", "2 token ids but 1 entries"),
        ({"input_ids": [1, 2]}, "bad token ids", "loss_mask or labels"),
        (
            {"prompt_token_ids": [1], "token_ids": [9999]},
            "bad token ids",
            "9999 is outside this tokenizer's vocabulary",
        ),
        ({"prompt_token_ids": [1], "token_ids": ["a"]}, "bad token ids", "'a'"),
        ({"prompt_token_ids": [1], "token_ids": [None]}, "bad token ids", "None"),
        ({}, "bad token ids", "loss_mask or labels"),
    ],
)
def test_bad_token_ids(make_tokenizer, meta, reason, detail):
    with pytest.raises(Reject) as caught:
        ChatTemplate(make_tokenizer()).encode(Conversation("c", (), meta))
    assert caught.value.reason == reason and detail in caught.value.detail


def test_token_ids_of_another_tokenizer_are_noticed(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    row = {"prompt_token_ids": [1, 2], "token_ids": template.tokenizer.encode("Hello", add_special_tokens=False)}
    assert template.encode(Conversation("c", tuple(talk("Hi", "Hello")), row)).loss_mask.sum() == 5
    row["token_ids"] = [id + 1 for id in row["token_ids"]]
    with pytest.raises(Reject, match="token ids of another tokenizer"):
        template.encode(Conversation("c", tuple(talk("Hi", "Hello")), row))
