"""A running cluster as one arm of a benchmark: connected to, waited for, sent traffic, let go."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from benchmarks.traffic import Sender
from protos.client import Client, ClientTLS, RetryPolicy, ServedModel

NUM_CLIENTS = 4
PROBE_S = 1.0


class NoServerError(Exception):
    """No healthy server answered in time."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a cluster is reached, and how long is waited for it."""

    address: str
    wait_s: float  # for a healthy server
    timeout_s: float  # of one request
    tls: ClientTLS | None = None
    api_key: str | None = None


class Target:
    """One cluster. Its clients are opened by `connect` and closed by `close`, and by nobody else."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._clients: list[Client] = []

    async def connect(self) -> None:
        """Wait until the server says that it serves, then open the clients. Raises NoServerError if it does not."""
        async with health_channel(self._access) as channel:
            await self._wait_until_healthy(channel)
        self._clients = [self._client() for _ in range(NUM_CLIENTS)]

    async def close(self) -> None:
        """Close the clients. Idempotent."""
        for client in self._clients:
            await client.close()
        self._clients = []

    def sender(self) -> Sender:
        """Sends requests to this cluster, each ended by the time limit at the latest."""
        return Sender(self._clients)

    async def model(self) -> ServedModel:
        """The first model served, and its limits."""
        models = await self._clients[0].models()
        if not models:
            raise NoServerError(f"{self._access.address} serves no model yet; wait for its workers, or raise --wait")
        return models[0]

    def _client(self) -> Client:
        access = self._access
        once = RetryPolicy(max_attempts=1)
        return Client(access.address, tls=access.tls, api_key=access.api_key, timeout_s=access.timeout_s, retry=once)

    async def _wait_until_healthy(self, channel: grpc.aio.Channel) -> None:
        access, ends_s = self._access, time.perf_counter() + self._access.wait_s
        while (answer := await _health(channel)) != "SERVING":
            if time.perf_counter() > ends_s:
                raise NoServerError(
                    f"no healthy server at {access.address} after {access.wait_s:g} s ({answer}); "
                    "start one with `headwater serve`, name another with --target, or wait longer with --wait"
                )
            await asyncio.sleep(PROBE_S / 4)


def health_channel(access: Access) -> grpc.aio.Channel:
    """A channel of its own for health checks."""
    if access.tls is None:
        return grpc.aio.insecure_channel(access.address)
    files = (access.tls.ca_file, access.tls.key_file, access.tls.cert_file)
    ca, key, cert = (None if path is None else path.read_bytes() for path in files)
    return grpc.aio.secure_channel(access.address, grpc.ssl_channel_credentials(ca, key, cert))


async def _health(channel: grpc.aio.Channel) -> str:
    try:
        request = health_pb2.HealthCheckRequest()
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PROBE_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
