"""The router as a Ray Serve deployment: life, membership and control calls. Tokens never pass through here.

Serve pushes every change of the set of workers into this process, and Router hands it to its server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from protos.tls import PeerTLS
from protos.tracing import Tracing
from router.config import RouterConfig
from router.server import RouterServer

WANT_POLL_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """Where one router is and which workers it has. Router to driver."""

    router_id: str
    grpc: str
    metrics: str
    workers: Mapping[str, str]  # worker id to its metrics address
    num_connected: int  # workers with an open session


class Router:
    """One RouterServer in a process of its own. The server is started, fed and stopped only here."""

    _server: RouterServer | None = None  # until the constructor got that far
    _calling: asyncio.Task[None] | None = None  # for workers, where they come on demand

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        workers: DeploymentHandle[Any],
        config: RouterConfig,
        *,
        model_name: str,
        tokenizer_dir: Path,
        session_token: str,
        drain_timeout_s: float,
        tls: PeerTLS | None = None,
        tracing: Tracing | None = None,
        on_demand: bool = False,
        wanted: Mapping[str, int] | None = None,
    ) -> None:
        """`on_demand`: there may be no worker until one is called for. `wanted`: processes by role, for the metrics."""
        self._loop = asyncio.get_running_loop()
        self._drain_timeout_s = drain_timeout_s
        self._router_id = serve.get_replica_context().replica_id.unique_id
        self._worker_metrics: dict[str, str] = {}
        self._server = RouterServer(
            config,
            model_name=model_name,
            tokenizer_dir=tokenizer_dir,
            session_token=session_token,
            peer_tls=tls,
            tracing=tracing,
            router_id=self._router_id,
            on_demand=on_demand,
            wanted=wanted,
        )
        self._address = await self._server.start()
        self._workers = workers.options()  # an open handle keeps Serve's membership feed running
        if on_demand:
            self._calling = asyncio.create_task(self._call_workers(self._server), name="call for workers")

    def members_changed(self, announced: Mapping[str, Mapping[str, str]]) -> None:
        """The whole set of workers, id to what each announced. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._set_workers, announced)

    def _set_workers(self, announced: Mapping[str, Mapping[str, str]]) -> None:
        assert self._server is not None
        self._worker_metrics = {worker: addresses["metrics"] for worker, addresses in announced.items()}
        self._server.set_workers({worker: addresses["session"] for worker, addresses in announced.items()})

    async def status(self) -> RouterStatus:
        """For the driver, through the Serve handle."""
        assert self._server is not None
        address = self._address
        return RouterStatus(
            self._router_id, address.grpc, address.metrics, self._worker_metrics, self._server.num_connected
        )

    async def drafters(self) -> dict[str, str]:
        """For the driver, through the Serve handle: the drafters that a worker knows, id to metrics address."""
        if not self._worker_metrics:
            return {}
        known: dict[str, str] = await self._workers.drafters.remote()
        return known

    async def _call_workers(self, server: RouterServer) -> None:
        """While a worker is wanted, keep a call waiting for one: with none, that is all that makes Serve start one."""
        while True:
            await asyncio.sleep(WANT_POLL_S)
            if server.wants_worker:
                try:
                    await self._workers.drafters.remote()
                except (RayError, RayServeException) as error:  # it died at once: the next call asks for another
                    log.warning("a worker that was called for did not answer: %s", error)

    def check_health(self) -> None:
        """Called by Serve. Raises when this router can no longer serve; Serve then replaces the process."""
        if self._server is not None:
            self._server.check()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process: no new requests, live streams end first."""
        if self._server is not None:
            await self._server.stop(self._drain_timeout_s)
        if self._calling is not None:
            self._calling.cancel()
            await asyncio.gather(self._calling, return_exceptions=True)
