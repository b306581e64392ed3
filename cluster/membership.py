"""Who there is: the replicas of one deployment, as Serve tells the processes of another that hold a handle to it."""

from __future__ import annotations

import asyncio

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class MembershipFeed(RequestRouter):  # type: ignore[misc]
    """Tells this process's Router or Worker which replicas there are, as soon as Serve knows.

    Serve copies this class by value, its module's globals included, so it finds whom to tell through Serve's context.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with the full set, on Serve's own event loop, at the start and after every change."""
        super().update_replicas(replicas)
        self._tell()

    def _tell(self) -> None:
        from ray.serve import get_replica_context

        holder = get_replica_context().servable_object
        if holder is None:  # its constructor is still running
            asyncio.get_running_loop().call_later(0.02, self._tell)
            return
        replicas = self.curr_replicas.values()
        holder.members_changed({replica.replica_id.unique_id: replica.replica_metadata for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Any replica will do: only control calls go through handles."""
        return [candidate_replicas]
