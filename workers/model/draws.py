"""Randomness without state: every draw is a function of what it is for.

A draw is keyed by (request seed, output index, position, token id), so a token does not depend on which other requests
ran beside it, on preemption, or on the worker. The generator is SplitMix64 used as a counter-based one (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): mix(key + counter * golden ratio).

What else is drawn at a position has a purpose in its key, so that it is independent of the token's draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASK: Final = (1 << 64) - 1
GOLDEN: Final = 0x9E3779B97F4A7C15
MULTIPLIERS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MANTISSA_BITS: Final = 52


class Purpose(IntEnum):
    """What a position's draws are for, other than its token. A change of a number changes seeded texts."""

    PROPOSE = 1  # a drafter's candidates
    VERIFY = 2  # whether the target takes them, and what it says instead


def draw_key(seed: int, index: int, position: int) -> int:
    """The 64-bit key of one token's draw; `position` counts the output's tokens from 0."""
    key = _mix(seed)
    for part in (index, position):
        key = _mix(key ^ _mix(part + GOLDEN & MASK))
    return key


def draw_keys(seeds: Sequence[int], indexes: Sequence[int], positions: Sequence[int]) -> NDArray[np.uint64]:
    """`draw_key` of many draws at once. [draws]"""
    parts = np.array([seeds, indexes, positions], dtype=np.uint64)
    parts[1:] += np.uint64(GOLDEN)
    mix(parts)
    return mix(mix(parts[0] ^ parts[1]) ^ parts[2])


def uniforms(key: int, purpose: Purpose, count: int) -> NDArray[np.float64]:
    """The first `count` of a position's uniform draws in (0, 1) for a purpose; `key` is its token's. [count]"""
    stream = _mix(key ^ _mix(purpose + GOLDEN & MASK))
    bits = mix(counters(count) + np.uint64(stream)) >> np.uint64(64 - MANTISSA_BITS)
    return (bits.astype(np.float64) + 0.5) * 2.0**-MANTISSA_BITS


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer of each value, in place."""
    shifted = np.empty_like(values)
    for shift, multiplier in MULTIPLIERS:
        values ^= np.right_shift(values, shift, out=shifted)
        values *= np.uint64(multiplier)
    values ^= np.right_shift(values, 31, out=shifted)
    return values


def counters(vocab_size: int) -> NDArray[np.uint64]:
    """What is added to a key before it is mixed, by token id. [vocab_size]"""
    return np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(GOLDEN)


def exponential(keys: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard exponential draws, one per key and token id. float32 [keys, vocab_size]

    Taken from the small end of a 52-bit uniform, where floats are dense, so that even the rarest winner of a large
    vocabulary has its exact share.
    """
    state = torch.tensor([_signed(int(key)) for key in keys], dtype=torch.int64, device=device)
    counters = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(GOLDEN)
    return _exponential(state[:, None] + counters[None, :])  # wraps modulo 2**64


def exponential_of(states: NDArray[np.uint64]) -> Tensor:
    """The same draws for any sums of a key and a token's counter, not mixed yet. float32, shaped as the states"""
    return _exponential(torch.from_numpy(states.view(np.int64)))


def _exponential(bits: Tensor) -> Tensor:
    for shift, multiplier in MULTIPLIERS:
        bits = (bits ^ _shift_right(bits, shift)) * _signed(multiplier)
    bits = bits ^ _shift_right(bits, 31)
    uniform = (_shift_right(bits, 64 - MANTISSA_BITS).to(torch.float64) + 0.5) * 2.0**-MANTISSA_BITS
    return -torch.log1p(-uniform).to(torch.float32)


def _mix(value: int) -> int:
    """SplitMix64's finalizer."""
    for shift, multiplier in MULTIPLIERS:
        value = ((value ^ (value >> shift)) * multiplier) & MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(values: Tensor, shift: int) -> Tensor:
    """Logical shift of int64 bits."""
    return (values >> shift) & ((1 << (64 - shift)) - 1)
