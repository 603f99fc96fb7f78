"""Random numbers for draws, as a function of a seed and a position: no generator, no state.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") on int64 tensors, whose
arithmetic wraps. The same on every device, and nothing to save or restore when a round is captured or repeated.
"""

import secrets

from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
WORD = 1 << 64


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform in [0, 1), float64: one number per seed (B,) and position (B, S) of its sequence."""
    words = seeds[:, None] + positions * _signed(GAMMA)
    for shift, factor in MIX:
        words = (words ^ _shifted(words, shift)) * _signed(factor)
    words = words ^ _shifted(words, 31)
    return _shifted(words, 11).double() * 2.0**-53


def seed_word(seed: int | None) -> int:
    """A seed as the int64 that `uniforms` takes; neighbouring seeds become distant words. None: a fresh one."""
    word = (secrets.randbits(64) if seed is None else (seed + 1) * GAMMA) % WORD
    for shift, factor in MIX:
        word = ((word ^ (word >> shift)) * factor) % WORD
    return _signed(word ^ (word >> 31))


def _signed(word: int) -> int:
    """A 64-bit word as a signed number."""
    return word - WORD if word >= WORD // 2 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
