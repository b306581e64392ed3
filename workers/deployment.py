"""The worker as a Ray Serve deployment: life, membership and control calls. Tokens never pass through here.

Serve starts one Worker per replica; routers learn its address from the metadata it announces and open a session to it.
So does a Worker with the drafters' addresses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray.util
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle

from protos.tls import PeerTLS
from protos.tracing import Tracing
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
        tls: PeerTLS | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        from workers.server import WorkerServer  # brings torch: only the replica needs it

        context = serve.get_replica_context()
        self._drain_timeout_s = drain_timeout_s
        self._drafter_metrics: dict[str, str] = {}
        self._server = WorkerServer(
            config.model_copy(update={"session": on_this_node(config.session)}),
            worker_id=context.replica_id.unique_id,
            session_token=session_token,
            tls=tls,
            local_rank=context.rank.local_rank,
            threads=threads,
            puller=_RayPuller(context.replica_id),
            tracing=tracing,
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve again and again, where the number of workers follows the load (cluster/autoscaling.py)."""
        assert self._server is not None
        return asdict(self._server.usage())

    def packed_prefix(self, salt: str, token_ids: Sequence[int], timeout_s: float) -> npt.NDArray[np.uint8] | None:
        """For a worker on another node, through the object store: what this one has of a prompt. Waits, in a thread."""
        if self._server is None:
            return None
        found = self._server.packed_prefix(salt, token_ids, timeout_s=timeout_s)
        return None if found is None else np.frombuffer(found, dtype=np.uint8)

    def check_health(self) -> None:
        """Called by Serve. Raises when the engine can no longer serve; Serve then replaces this process."""
        if self._server is not None:
            self._server.check()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process: live streams end or move to other workers first."""
        if self._server is not None:
            await self._server.drain(self._drain_timeout_s)
            await self._server.stop()


class _RayPuller:
    """A Puller: blocks go through Ray's object store, whose copies on this node are read in place."""

    def __init__(self, own: ReplicaID) -> None:
        self._own = own

    async def pull(self, worker_id: str, salt: str, token_ids: Sequence[int], *, timeout_s: float) -> memoryview | None:
        return await asyncio.to_thread(self._pull, worker_id, salt, token_ids, timeout_s)

    def _pull(self, worker_id: str, salt: str, token_ids: Sequence[int], timeout_s: float) -> memoryview | None:
        """Raises OSError where the worker, its node or Ray fails."""
        name = replace(self._own, unique_id=worker_id).to_full_id_str()
        try:
            actor = ray.get_actor(name, namespace=SERVE_NAMESPACE)
            reply = actor.__ray_call__.remote(_packed_there, salt, tuple(token_ids), timeout_s)
            array = ray.get(reply, timeout=timeout_s)
        except (ValueError, RayError) as error:
            raise OSError(f"{name} gave no prefix: {error}") from error
        return None if array is None else memoryview(array)


def _packed_there(_: object, salt: str, token_ids: Sequence[int], timeout_s: float) -> npt.NDArray[np.uint8] | None:
    """Runs in the source's process, on the thread of its actor."""
    worker: Worker = serve.get_replica_context().servable_object
    return worker.packed_prefix(salt, token_ids, timeout_s)


def on_this_node(section: _Host) -> _Host:
    """A section with an empty host replaced by this node's address."""
    return section if section.host else section.model_copy(update={"host": ray.util.get_node_ip_address()})
