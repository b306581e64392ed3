"""Randomness without state: every draw is a function of what it is for.

A draw is keyed by (request seed, output index, position, token id), so a token does not depend on which other requests
ran beside it, on preemption, or on the worker. The generator is SplitMix64 used as a counter-based one (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): mix(key + counter * golden ratio).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MASK: Final = (1 << 64) - 1
GOLDEN: Final = 0x9E3779B97F4A7C15
MULTIPLIERS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MANTISSA_BITS: Final = 52


def draw_key(seed: int, index: int, position: int) -> int:
    """The 64-bit key of one token's draw; `position` counts the output's tokens from 0."""
    key = _mix(seed)
    for part in (index, position):
        key = _mix(key ^ _mix(part + GOLDEN & MASK))
    return key


def exponential(keys: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard exponential draws, one per key and token id. float32 [keys, vocab_size]

    Taken from the small end of a 52-bit uniform, where floats are dense, so that even the rarest winner of a large
    vocabulary has its exact share.
    """
    state = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)
    counters = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(GOLDEN)
    bits = state[:, None] + counters[None, :]  # wraps modulo 2**64
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
