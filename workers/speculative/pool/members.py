"""The drafters there are: told by the deployment, read by the engine's thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from protos.tls import PeerTLS


class Members:
    """Drafter id to its channel's address. Replaced as a whole, from any thread."""

    def __init__(self, addresses: Mapping[str, str] | None = None) -> None:
        self._addresses = dict(addresses or {})

    @property
    def addresses(self) -> Mapping[str, str]:
        """As last told; the same object until they change."""
        return self._addresses

    def set(self, addresses: Mapping[str, str]) -> None:
        """From now on there are these."""
        self._addresses = dict(addresses)


@dataclass(frozen=True, slots=True)
class PoolAccess:
    """What a worker needs to use the pool."""

    members: Members
    token: str = field(repr=False)  # that drafters know, too
    tls: PeerTLS | None = None  # None: plain text
