"""The routers a client knows: a channel to each, which is used next, and how one that failed rests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.errors import InvalidParameter
from protos.v1 import cluster_pb2_grpc
from protos.v1 import inference_pb2_grpc as pb_grpc

FIRST_REST_S = 0.25
MAX_REST_S = 30.0
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ClientTLS:
    """PEM files. Without `ca_file` the system's authorities count; certificate and key are for mutual TLS."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


class Endpoint:
    """One router. Mutated by Endpoints, and by Attempts, which learn whether it is up."""

    def __init__(self, address: str, channel: grpc.aio.Channel, *, clock: Clock = time.monotonic) -> None:
        self.address = address
        self.channel = channel
        self.stub: pb_grpc.InferenceAsyncStub = pb_grpc.InferenceStub(channel)
        self.cluster_stub: cluster_pb2_grpc.ClusterAsyncStub = cluster_pb2_grpc.ClusterStub(channel)
        self._clock = clock
        self._num_rests = 0  # in a row
        self._rests_until = float("-inf")

    @property
    def rests_until(self) -> float:
        """By the clock; in the past, or never, if it does not rest."""
        return self._rests_until

    @property
    def is_ready(self) -> bool:
        """Whether calls may go here."""
        return self._clock() >= self._rests_until

    @property
    def is_suspect(self) -> bool:
        """Whether it failed and has not answered since."""
        return self._num_rests > 0

    def rest(self) -> None:
        """It failed. Many calls that fail together are one failure."""
        if self.is_ready:
            rest_s = min(FIRST_REST_S * 2.0**self._num_rests, MAX_REST_S)
            self._num_rests += 1
            self._rests_until = self._clock() + rest_s * random.uniform(0.5, 1.0)

    def wake(self) -> None:
        """It answered."""
        self._num_rests = 0
        self._rests_until = float("-inf")


class Endpoints:
    """The routers of one client, used in turn. Owned by Client; touched on the event loop only."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        """At least one."""
        self._all = list(endpoints)
        self._next = 0

    @classmethod
    def connect(cls, target: str | Sequence[str], tls: ClientTLS | None) -> Endpoints:
        """Raises InvalidParameter if the target names no router."""
        credentials = None if tls is None else _credentials(tls)
        return cls([Endpoint(address, _channel(address, credentials)) for address in _addresses(target)])

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._all)

    def choose(self, *, but: Collection[Endpoint] = ()) -> Endpoint:
        """The next in turn that is ready and not in `but`; if none is, the one whose rest ends first.

        One that failed and has not answered since is given to one call at a time: it may be slow to fail again.
        """
        in_turn = self._all[self._next :] + self._all[: self._next]
        ready = next((e for e in in_turn if e.is_ready and e not in but), None)
        chosen = ready or min(in_turn, key=lambda e: (e in but, e.rests_until))
        self._next = (self._all.index(chosen) + 1) % len(self._all)
        if chosen.is_suspect:
            chosen.rest()
        return chosen

    def has_ready(self, *, but: Collection[Endpoint]) -> bool:
        """Whether a router other than these is ready."""
        return any(e.is_ready for e in self._all if e not in but)

    async def close(self) -> None:
        """Close every channel; calls in progress are cancelled."""
        await asyncio.gather(*(endpoint.channel.close() for endpoint in self._all))


def _addresses(target: str | Sequence[str]) -> list[str]:
    parts = target.split(",") if isinstance(target, str) else target
    addresses = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not addresses:
        raise InvalidParameter(f"target {target!r} names no router; give host:port, several with commas between them")
    return addresses


def _credentials(tls: ClientTLS) -> grpc.ChannelCredentials:
    ca, key, cert = (None if path is None else path.read_bytes() for path in (tls.ca_file, tls.key_file, tls.cert_file))
    return grpc.ssl_channel_credentials(ca, key, cert)


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),  # our own retries decide when to try again
        ("grpc.min_reconnect_backoff_ms", 5000),  # how long a host that does not answer at all holds a call up
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", 20_000),  # a stream is told that its router's machine is gone
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),  # a reader sends nothing
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)
