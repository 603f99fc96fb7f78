"""Numbers for draws: by the published algorithm, uniform, and unrelated between seeds and positions."""

import torch

from fledge.decoding.noise import GAMMA, MIX, WORD, seed_word, uniforms


def split_mix(word: int) -> int:
    """SplitMix64's output function on Python integers."""
    for shift, factor in MIX:
        word = ((word ^ (word >> shift)) * factor) % WORD
    return word ^ (word >> 31)


def test_the_published_sequence():
    """The first outputs for seed 1234567, as printed with the reference implementation."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    words = [split_mix((1234567 + step * GAMMA) % WORD) for step in (1, 2, 3, 4)]
    assert words == expected
    found = uniforms(torch.tensor([1234567]), torch.arange(1, 5)[None])[0]
    assert found.tolist() == [(word >> 11) * 2.0**-53 for word in expected]


def test_uniform_and_independent():
    seeds = torch.tensor([seed_word(seed) for seed in range(200)])
    found = uniforms(seeds, torch.arange(500).expand(200, -1))
    assert 0 <= found.min() and found.max() < 1
    counts = torch.histc(found.float(), 20, 0, 1) / found.numel()
    assert (counts - 0.05).abs().max() < 2e-3
    for one, other in ((found[:-1], found[1:]), (found[:, :-1], found[:, 1:])):  # neighbouring seeds, positions
        pair = torch.stack((one.flatten(), other.flatten()))
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.01


def test_the_correlation_check_can_fail():
    """Negative control: seeds that are used as they are, next to each other, repeat one another's sequence."""
    seeds = torch.tensor([0, GAMMA - WORD])  # one step apart
    found = uniforms(seeds, torch.arange(50).expand(2, -1))
    assert torch.equal(found[0, 1:], found[1, :-1])


def test_seeds():
    assert seed_word(3) == seed_word(3) != seed_word(4)
    assert seed_word(None) != seed_word(None)
    assert all(-(2**63) <= seed_word(seed) < 2**63 for seed in (-1, 0, 2**63, 2**70))
