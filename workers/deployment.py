"""The worker as a Ray Serve deployment: life, membership and control calls. Tokens never pass through here.

Serve starts one Worker per replica; routers learn its address from the metadata it announces and open a session to it.
So does a Worker with the drafters' addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import ray.util
from ray import serve
from ray.serve.handle import DeploymentHandle

from workers.config import DrafterConfig, SessionSection, WorkerConfig

if TYPE_CHECKING:
    from workers.server import WorkerServer

_Host = TypeVar("_Host", SessionSection, DrafterConfig)


class Worker:
    """One WorkerServer in a process of its own. The server is started and stopped only here."""

    _server: WorkerServer | None = None  # until the constructor got that far

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: WorkerConfig,
        drafters: DeploymentHandle[Any] | None = None,
        *,
        session_token: str,
        threads: int,
        drain_timeout_s: float,
    ) -> None:
        from workers.server import WorkerServer  # brings torch: only the replica needs it

        context = serve.get_replica_context()
        self._drain_timeout_s = drain_timeout_s
        self._drafter_metrics: dict[str, str] = {}
        self._server = WorkerServer(
            config.model_copy(update={"session": on_this_node(config.session)}),
            worker_id=context.replica_id.unique_id,
            session_token=session_token,
            local_rank=context.rank.local_rank,
            threads=threads,
        )
        self._address = await self._server.start()
        self._drafters = drafters and drafters.options()  # an open handle keeps Serve's membership feed running

    def record_replica_metadata(self) -> dict[str, str]:
        """Called by Serve once, after the constructor; reaches every router."""
        return {"session": self._address.session, "metrics": self._address.metrics}

    def members_changed(self, announced: Mapping[str, Mapping[str, str]]) -> None:
        """The whole set of drafters, id to what each announced. May be called from any thread."""
        self._drafter_metrics = {drafter: addresses["metrics"] for drafter, addresses in announced.items()}
        if self._server is not None:
            self._server.set_drafters({drafter: addresses["channel"] for drafter, addresses in announced.items()})

    async def drafters(self) -> dict[str, str]:
        """For routers, through the Serve handle: the drafters it knows, id to metrics address."""
        return self._drafter_metrics

    def check_health(self) -> None:
        """Called by Serve. Raises when the engine can no longer serve; Serve then replaces this process."""
        if self._server is not None:
            self._server.check()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process: live streams end or move to other workers first."""
        if self._server is not None:
            await self._server.drain(self._drain_timeout_s)
            await self._server.stop()


def on_this_node(section: _Host) -> _Host:
    """A section with an empty host replaced by this node's address."""
    return section if section.host else section.model_copy(update={"host": ray.util.get_node_ip_address()})
