"""Token-work: what a request costs whoever runs it, in tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Rows that a worker has still to compute."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_outputs: int = 0
