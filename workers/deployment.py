"""The worker as a Ray Serve deployment: life, membership and control calls. Tokens never pass through here.

Serve starts one Worker per replica; routers learn its address from the metadata it announces and open a session to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray.util
from ray import serve

from workers.config import WorkerConfig

if TYPE_CHECKING:
    from workers.server import WorkerServer


class Worker:
    """One WorkerServer in a process of its own. The server is started and stopped only here."""

    _server: WorkerServer | None = None  # until the constructor got that far

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: WorkerConfig, *, session_token: str, threads: int, drain_timeout_s: float
    ) -> None:
        from workers.server import WorkerServer  # brings torch: only the replica needs it

        context = serve.get_replica_context()
        self._drain_timeout_s = drain_timeout_s
        self._server = WorkerServer(
            _on_this_node(config),
            worker_id=context.replica_id.unique_id,
            session_token=session_token,
            local_rank=context.rank.local_rank,
            threads=threads,
        )
        self._address = await self._server.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """Called by Serve once, after the constructor; reaches every router's MembershipFeed."""
        return {"session": self._address.session, "metrics": self._address.metrics}

    def check_health(self) -> None:
        """Called by Serve. Raises when the engine can no longer serve; Serve then replaces this process."""
        if self._server is not None:
            self._server.check()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process: live streams end or move to other workers first."""
        if self._server is not None:
            await self._server.drain(self._drain_timeout_s)
            await self._server.stop()


def _on_this_node(config: WorkerConfig) -> WorkerConfig:
    """The configuration with an empty session host replaced by this node's address."""
    if config.session.host:
        return config
    session = config.session.model_copy(update={"host": ray.util.get_node_ip_address()})
    return config.model_copy(update={"session": session})
