"""Long texts read in parts: the states of one pass, for every tiny target, and refused where they are not."""

import pytest
import torch
from odd_targets import ROPE_LIMIT, odd_target
from tiny import NAMES, prompt, tiny_draft, tiny_target

from fledge.commands.plan import forward_numbers
from fledge.data.tokenize import Sample
from fledge.errors import UserError
from fledge.target import long_texts
from fledge.target.live import BatchedSource, LiveSource
from fledge.target.long_texts import read_text
from fledge.target.record import TargetRecord

LENGTH = 61  # longer than every window


def sample(length: int = LENGTH) -> Sample:
    return Sample("long", torch.tensor(prompt(length)), torch.arange(length) > length // 2)


def error(found: TargetRecord, expected: TargetRecord) -> float:
    return max(
        ((getattr(found, name) - getattr(expected, name)).abs().max() / getattr(expected, name).abs().max()).item()
        for name in ("tap_hidden", "last_hidden")
    )


@pytest.mark.parametrize("name", [*NAMES, "qwen3_next", "lfm2"])
def test_parts_are_the_whole(name):
    target = tiny_target(name)
    expected = LiveSource(target).record(sample())
    for chunk in (7, 60, LENGTH):
        assert error(LiveSource(target, prefill_chunk=chunk).record(sample()), expected) < 1e-4
    batched = list(BatchedSource(target, 1000, prefill_chunk=7).records([sample()]))
    assert error(batched[0], expected) < 1e-4


def test_short_texts_are_read_at_once(monkeypatch):
    target, sizes = tiny_target("llama"), []
    forward = target.forward
    monkeypatch.setattr(target, "forward", lambda ids, **more: sizes.append(ids.shape[1]) or forward(ids, **more))
    LiveSource(target, prefill_chunk=LENGTH).record(sample())
    assert sizes == [LENGTH]
    LiveSource(target, prefill_chunk=25).record(sample())
    assert max(sizes[1:]) == 25 and sizes[-3:] == [25, 25, 11]


def test_what_reads_parts_otherwise_is_refused():
    with pytest.raises(UserError, match="tiny-jamba: a text cannot be read in parts by this target .*differ by"):
        read_text(odd_target("jamba"), torch.tensor(prompt(40)), 16)
    assert read_text(odd_target("jamba"), torch.tensor(prompt(40)), 40).last_hidden.shape[1] == 40


def test_without_the_comparison_it_would_be_wrong(monkeypatch):
    """Control: what is refused differs from one pass by far more than rounding."""
    monkeypatch.setattr(long_texts, "_refuse_other_states", lambda target, length: None)
    target, ids = odd_target("jamba"), torch.tensor(prompt(40))
    found, expected = read_text(target, ids, 16).last_hidden, target.forward(ids[None]).last_hidden
    assert (found - expected).norm() > 0.02 * expected.norm()


def test_longrope_is_read_at_once_past_its_limit():
    target = odd_target("phi3_longrope")
    with pytest.raises(UserError, match=f"past {ROPE_LIMIT} tokens its rope is another one for the whole text"):
        read_text(target, torch.tensor(prompt(ROPE_LIMIT + 1)), 16)
    assert read_text(target, torch.tensor(prompt(ROPE_LIMIT)), 16).last_hidden.shape[1] == ROPE_LIMIT


def test_the_plan_counts_a_part_and_the_cache():
    target = tiny_target("llama")
    text, draft = target.text_config, tiny_draft(target).config
    whole, parts = (forward_numbers(text, draft, 4096, chunk) for chunk in (0, 64))
    assert whole == 4096 * (6 * 64 + 3 * 96)
    assert parts == 64 * (6 * 64 + 3 * 96) + 2 * text.num_hidden_layers * 2 * 16 * 4096
    assert forward_numbers(text, draft, 64, 128) == forward_numbers(text, draft, 64, 0)
