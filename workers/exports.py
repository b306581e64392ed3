"""Prefixes that other workers ask for: copied out between two steps, and left in the arena for whoever comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.blocks import block_hashes
from protos.v1 import session_pb2 as pb
from workers.kv.arena import Arena
from workers.kv.block import BlockFormat, BlockLabel, Packing
from workers.loop import EngineLoop
from workers.metrics import WorkerMetrics


class Exports:
    """Owns the exports that are under way. Lives on one event loop, but for `packed`."""

    def __init__(
        self, loop: EngineLoop, block_format: BlockFormat | None, arena: Arena | None, metrics: WorkerMetrics
    ) -> None:
        self._loop = loop
        self._format = block_format
        self._arena = arena
        self._metrics = metrics
        self._running: dict[int, asyncio.Task[str | None]] = {}  # by name of the last block

    async def answer(self, request: pb.ExportPrefixRequest) -> pb.ExportPrefixResponse:
        """What the worker has of the prompt, and where, if the caller can read it there."""
        salt, held = request.cache_salt, self._held(request.cache_salt, request.token_ids)
        if self._format is None or not held:
            return pb.ExportPrefixResponse()
        if self._arena is None or request.arena_id != self._arena.arena_id:
            return pb.ExportPrefixResponse(num_tokens=len(held))
        label = self._format.label(salt, held)
        path = self._arena.find(_file_name(label)) or await self._share(salt, held, label, self._arena)
        return pb.ExportPrefixResponse(num_tokens=len(held), path=path or "")

    def packed(self, salt: str, token_ids: Sequence[int], *, timeout_s: float) -> memoryview | None:
        """The packed block of what the worker has of a prompt. Safe from any thread, and waits for the engine's."""
        held = self._held(salt, token_ids)
        if self._format is None or not held:
            return None
        packing = self._packing(self._format.label(salt, held))
        if not self._loop.export(salt, held, packing.payload).result(timeout_s):
            return None
        self._metrics.prefix_exported()
        return packing.seal()

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _held(self, salt: str, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The longest beginning, in whole pages, that the engine had after its last step."""
        if self._format is None:
            return ()
        names = block_hashes(salt, token_ids, self._format.page_size)
        return tuple(token_ids[: self._loop.num_held(names) * self._format.page_size])

    async def _share(self, salt: str, prefix: tuple[int, ...], label: BlockLabel, arena: Arena) -> str | None:
        """Whoever asks for the same while it is under way waits for the same."""
        task = self._running.get(label.name)
        if task is None:
            task = self._running[label.name] = asyncio.create_task(self._export(salt, prefix, label, arena))
            task.add_done_callback(lambda _: self._running.pop(label.name))
        return await asyncio.shield(task)

    async def _export(self, salt: str, prefix: tuple[int, ...], label: BlockLabel, arena: Arena) -> str | None:
        packing = await asyncio.to_thread(self._packing, label)
        if not await asyncio.wrap_future(self._loop.export(salt, prefix, packing.payload)):
            return None
        self._metrics.prefix_exported()
        return await asyncio.to_thread(lambda: arena.publish(_file_name(label), packing.seal()))

    def _packing(self, label: BlockLabel) -> Packing:
        assert self._format is not None
        return Packing(label, label.num_pages * self._format.page_bytes)


def _file_name(label: BlockLabel) -> str:
    return f"{label.name:016x}"
