"""Rendezvous hashing (Thaler and Ravishankar, 1998): every key has an order of its own among the workers.

Whoever knows the same workers finds the same order, in any process, and a worker that leaves moves only its own keys.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

KEY_MASK: Final = (1 << 64) - 1


def rendezvous(key: int, worker_id: str) -> int:
    """The worker's place in the key's order; the smallest is first."""
    digest = blake2b(worker_id.encode(), digest_size=8, key=(key & KEY_MASK).to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")
