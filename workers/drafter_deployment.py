"""The drafter as a Ray Serve deployment: life, membership and control calls. Drafts never pass through here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from ray import serve

from protos.tls import PeerTLS
from protos.tracing import Tracing
from workers.config import DrafterConfig
from workers.deployment import on_this_node

if TYPE_CHECKING:
    from workers.drafter import DrafterProcess


class Drafter:
    """One DrafterProcess. It is started and stopped only here."""

    _process: DrafterProcess | None = None  # until the constructor got that far

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: DrafterConfig,
        *,
        target: Path,
        session_token: str,
        tls: PeerTLS | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        from workers.drafter import DrafterProcess  # brings torch: only the replica needs it

        context = serve.get_replica_context()
        self._process = DrafterProcess(
            on_this_node(config),
            target=target,
            token=session_token,
            tls=tls,
            tracing=tracing,
            drafter_id=context.replica_id.unique_id,
            local_rank=context.rank.local_rank,
        )
        self._address = await asyncio.to_thread(self._process.start)

    def record_replica_metadata(self) -> dict[str, str]:
        """Called by Serve once, after the constructor; reaches every worker."""
        return {"channel": self._address.channel, "metrics": self._address.metrics}

    def check_health(self) -> None:
        """Called by Serve. Raises when this drafter has failed; Serve then replaces this process."""
        if self._process is not None:
            self._process.check()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process. Nothing is lost: targets go on without drafts."""
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
