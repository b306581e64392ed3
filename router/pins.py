"""Prefixes that every worker keeps: computed once, held against eviction, and there before a new worker gets work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protos.blocks import block_hashes
from protos.errors import InvalidParameter, Overloaded


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """Whole blocks of a prompt, for one tenant's requests."""

    pin_id: str  # the name of its last block: the same prefix is pinned once
    tenant: str
    cache_salt: str
    token_ids: tuple[int, ...]
    block_hashes: tuple[int, ...]

    @property
    def session_id(self) -> str:
        """What workers call it: two tenants may have pinned the same."""
        return f"{self.tenant}/{self.pin_id}"


class Pins:
    """What this router has pinned. Owned by Fleet; touched on the event loop only."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: of all pins of one tenant."""
        self._max_tokens = max_tokens
        self._pins: dict[tuple[str, str], PinnedPrefix] = {}  # by tenant and id

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[PinnedPrefix]:
        return iter(list(self._pins.values()))

    def of(self, tenant: str) -> list[PinnedPrefix]:
        """One tenant's, in the order in which they were made."""
        return [pin for pin in self._pins.values() if pin.tenant == tenant]

    def add(self, tenant: str, cache_salt: str, token_ids: Sequence[int], page_size: int) -> PinnedPrefix:
        """Remember the whole blocks of a prompt. Raises InvalidParameter if there are none, Overloaded if too many."""
        num_tokens = len(token_ids) // page_size * page_size if page_size else 0
        if not num_tokens:
            raise InvalidParameter(
                f"the prefix has {len(token_ids)} tokens, a block of the workers' prefix caches has {page_size}; "
                "pin a longer one"
            )
        whole = tuple(token_ids[:num_tokens])
        hashes = tuple(block_hashes(cache_salt, whole, page_size))
        pin = PinnedPrefix(f"{hashes[-1]:016x}", tenant, cache_salt, whole, hashes)
        if (tenant, pin.pin_id) not in self._pins:
            self._check_room(tenant, num_tokens)
            self._pins[tenant, pin.pin_id] = pin
        return self._pins[tenant, pin.pin_id]

    def remove(self, tenant: str, pin_id: str) -> PinnedPrefix | None:
        """Forget one of a tenant's pins; None if there is none."""
        return self._pins.pop((tenant, pin_id), None)

    def _check_room(self, tenant: str, num_tokens: int) -> None:
        num_pinned = sum(len(pin.token_ids) for pin in self.of(tenant))
        if num_pinned + num_tokens > self._max_tokens:
            raise Overloaded(
                f"{tenant} has pinned {num_pinned} tokens and the prefix has {num_tokens}, the limit is "
                f"{self._max_tokens}; unpin others first, or raise router.limits.max_pinned_tokens"
            )
