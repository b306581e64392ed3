"""`headwater api-key`: a key for a caller, and its hash for the tenants file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def api_key(
    hash_: Annotated[
        bool, typer.Option("--hash", help="Make no key: read one from the standard input and print its hash.")
    ] = False,
) -> None:
    """Make an API key. Prints the key, this once, and its hash, which goes to a tenant's `keys`."""
    from router.api_key import key_hash, new_key

    if hash_:
        print(key_hash(_read_key()))
        return
    key = new_key()
    print(key)
    print(key_hash(key))


def _read_key() -> str:
    """Raises BadParameter, without the key."""
    from router.api_key import MIN_CHARS

    key = sys.stdin.readline().strip()
    if len(key) < MIN_CHARS:
        raise typer.BadParameter(
            f"a key of {len(key)} characters could be found from its hash, {MIN_CHARS} is the least; "
            "make one without --hash",
            param_hint="--hash",
        )
    return key
