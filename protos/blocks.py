"""Names for what a prefix cache holds: one number for each whole block of a prompt, and for all that stands before it.

A block is a page of tokens. Its name is a hash of its tokens and of the name of the block before; the first one follows
from the cache salt. Whoever has a block's name therefore knows that everything up to it is the same, salt included, and
a caller with another salt cannot even name it. Routers name prompts, workers name pages, and they compare.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 8
TOKEN_BYTES: Final = 4


def root_hash(salt: str, block_size: int) -> int:
    """The name before the first block: of a salt, and of the number of tokens in a block."""
    return _hash(b"%d/" % block_size + salt.encode())


def chain_hashes(parent: int, tokens: bytes, block_size: int) -> list[int]:
    """Names of the whole blocks of `tokens` (int32, native order), the first of which follows the block `parent`."""
    size = block_size * TOKEN_BYTES
    hashes: list[int] = []
    before = parent.to_bytes(HASH_BYTES, "little")
    for start in range(0, len(tokens) - size + 1, size):
        before = blake2b(before + tokens[start : start + size], digest_size=HASH_BYTES).digest()
        hashes.append(int.from_bytes(before, "little"))
    return hashes


def block_hashes(salt: str, token_ids: Sequence[int], block_size: int) -> list[int]:
    """Names of the whole blocks of a prompt, in order."""
    num_whole = len(token_ids) // block_size * block_size
    return chain_hashes(root_hash(salt, block_size), array("i", token_ids[:num_whole]).tobytes(), block_size)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=HASH_BYTES).digest(), "little")
