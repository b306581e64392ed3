"""API keys: how one is made, and the hash under which the tenants file lists it.

A key is 32 random bytes, so nobody can try them all, and plain SHA-256 is the right hash: the slow, salted hashes are
for passwords, which can be guessed. For the same reason a look-up by the hash needs no constant time: whoever could
measure it would learn about a hash that he cannot choose.
"""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "hw-"
HASH_PREFIX = "sha256:"
NUM_RANDOM_BYTES = 32
MIN_CHARS = 20  # of a key made elsewhere; a shorter one could be found from its hash


def new_key() -> str:
    """A key that nobody has seen: `hw-` and 43 characters that need no quoting in URLs and shells."""
    return PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)


def key_hash(api_key: str) -> str:
    """How the tenants file names a key, such as `sha256:2bb8…`; the key cannot be had back from it."""
    return HASH_PREFIX + hashlib.sha256(api_key.encode()).hexdigest()
