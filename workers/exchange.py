"""Prefixes that another worker has computed, fetched before a request runs.

Stands between the session server and the engine loop: a request that comes with a source waits here, for a bounded
time, and is then run in any case. What was fetched is in the engine's inbox before the request; what was not is
computed. Within a machine a block is a file in the arena; elsewhere whoever deploys the worker knows how to pull it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import grpc

from protos.blocks import block_hashes
from protos.messages import PrefixSource
from protos.v1 import session_pb2 as pb
from workers.config import ExchangeSection
from workers.kv.arena import Arena
from workers.kv.block import BadBlock, BlockFormat, BlockMemory, HeldBlock, read_label
from workers.kv.block_file import BlockFile
from workers.loop import EngineLoop
from workers.metrics import WorkerMetrics
from workers.peers import Peers

log = logging.getLogger(__name__)

Way = Literal["node", "network"]

LEARNING_RATE: Final = 0.2
FORGETTING_RATE: Final = 0.02  # at every prefix that is not moved: one bad day does not last
MAX_KNOWN_APART: Final = 1024


class Puller(Protocol):
    """Gets blocks from workers that share no folder with this one. Of the shell that deploys workers."""

    async def pull(self, worker_id: str, salt: str, token_ids: Sequence[int], *, timeout_s: float) -> memoryview | None:
        """The packed block of what the worker has of a prompt, to be read only; None if it has nothing."""


class Pace:
    """How long it takes to move a block one way: a first guess, times what was learned. Mutated only by Exchange."""

    def __init__(self, *, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._factor = 1.0

    def predict(self, num_bytes: int) -> float:
        """Seconds."""
        return self._factor * self._guess(num_bytes)

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A block of so many bytes took so long."""
        self._factor += LEARNING_RATE * (seconds / self._guess(num_bytes) - self._factor)

    def forget(self) -> None:
        """Nothing was moved, so nothing was learned: go a little back to the first guess."""
        self._factor += FORGETTING_RATE * (1.0 - self._factor)

    def _guess(self, num_bytes: int) -> float:
        return self._latency_s + num_bytes / self._bytes_per_s


class Exchange:
    """Owns the fetches that are under way. Lives on one event loop."""

    def __init__(
        self,
        loop: EngineLoop,
        block_format: BlockFormat,
        peers: Peers,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        config: ExchangeSection,
        arena: Arena | None,
        puller: Puller | None,
    ) -> None:
        self._loop = loop
        self._format = block_format
        self._peers = peers
        self._metrics = metrics
        self._worker_id = worker_id
        self._config = config
        self._arena = arena
        self._puller = puller if config.mode == "auto" else None
        self._paces: dict[Way, Pace] = {
            "node": Pace(latency_s=0.01, bytes_per_s=1e9),
            "network": Pace(latency_s=0.05, bytes_per_s=2e8),
        }
        self._apart: set[str] = set()  # workers that were found to share no arena
        self._running: dict[int, asyncio.Task[None]] = {}  # by name of the last block

    async def fetch(self, salt: str, token_ids: Sequence[int], source: PrefixSource) -> None:
        """Get what the source has more of a prompt than this worker, if that is faster than computing it.

        On return it is the engine's, before anything that is submitted afterwards. Never raises, and never takes longer
        than the configured time: what could not be had is computed.
        """
        prefix = tuple(token_ids[: source.num_tokens // self._format.page_size * self._format.page_size])
        names = block_hashes(salt, prefix, self._format.page_size)
        num_gained = (len(names) - self._loop.num_held(names)) * self._format.page_size
        if source.worker_id == self._worker_id or num_gained <= 0:
            return
        task = self._running.get(names[-1])
        if task is None:
            if not self._pays(num_gained, len(names), source):
                self._metrics.prefix_computed("computed")
                return
            task = self._running[names[-1]] = asyncio.create_task(self._fetch(salt, prefix, source))
            task.add_done_callback(lambda _: self._running.pop(names[-1]))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _way(self, source: PrefixSource) -> Way | None:
        """How a block would come from there, as far as is known; None: in no way."""
        if self._arena is not None and source.worker_id not in self._apart:
            return "node"
        return "network" if self._puller is not None else None

    def _pays(self, num_gained: int, num_pages: int, source: PrefixSource) -> bool:
        way, rate = self._way(source), self._loop.prefill_tokens_per_s
        if way is None or num_gained < self._config.min_tokens:
            return False
        if rate is None or self._paces[way].predict(num_pages * self._format.page_bytes) < num_gained / rate:
            return True
        self._paces[way].forget()
        return False

    async def _fetch(self, salt: str, prefix: tuple[int, ...], source: PrefixSource) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                block = await self._bring(salt, prefix, source)
        except TimeoutError:
            self._metrics.prefix_computed("late")
        except (BadBlock, OSError, grpc.RpcError) as error:
            log.info("a prefix of %d tokens did not come from %s: %s", len(prefix), source.worker_id, error)
            self._metrics.prefix_computed("failed")
        except Exception:
            log.exception("a prefix did not come from %s", source.worker_id)
            self._metrics.prefix_computed("failed")
        else:
            self._take(salt, prefix, block)
        self._metrics.prefix_waited(time.monotonic() - began)

    def _take(self, salt: str, prefix: tuple[int, ...], block: HeldBlock | None) -> None:
        if block is None:
            self._metrics.prefix_computed("failed")
        else:
            self._loop.adopt(salt, prefix[: block.label.num_tokens], block)

    async def _bring(self, salt: str, prefix: tuple[int, ...], source: PrefixSource) -> HeldBlock | None:
        if self._way(source) == "node":
            return await self._open(salt, prefix, source)
        return await self._pull(salt, prefix, source)

    async def _open(self, salt: str, prefix: tuple[int, ...], source: PrefixSource) -> HeldBlock | None:
        """A file in the arena; by the network, if the source does not share it."""
        assert self._arena is not None
        began = time.monotonic()
        asked = pb.ExportPrefixRequest(cache_salt=salt, token_ids=prefix, arena_id=self._arena.arena_id)
        found = await self._peers.export_prefix(source.address, asked, timeout_s=self._config.timeout_s)
        if not found.path:
            if found.num_tokens:
                self._note_apart(source.worker_id)
            return await self._pull(salt, prefix, source) if found.num_tokens else None
        path = self._arena.resolve(found.path)
        if path is None or not 0 < found.num_tokens <= len(prefix) or found.num_tokens % self._format.page_size:
            raise BadBlock(f"{found.num_tokens} tokens in {found.path!r} are not what was asked for")
        label = self._format.label(salt, prefix[: found.num_tokens])
        block = await asyncio.to_thread(BlockFile.open, path, label)
        self._paces["node"].observe(block.payload.nbytes, time.monotonic() - began)
        return block

    async def _pull(self, salt: str, prefix: tuple[int, ...], source: PrefixSource) -> HeldBlock | None:
        if self._puller is None:
            return None
        began = time.monotonic()
        data = await self._puller.pull(source.worker_id, salt, prefix, timeout_s=self._config.timeout_s)
        if data is None:
            return None
        num_tokens = read_label(data).num_tokens
        if not 0 < num_tokens <= len(prefix) or num_tokens % self._format.page_size:
            raise BadBlock(f"a block of {num_tokens} tokens is not what was asked for")
        label = self._format.label(salt, prefix[:num_tokens])
        block = await asyncio.to_thread(BlockMemory, data, label)
        self._paces["network"].observe(block.payload.nbytes, time.monotonic() - began)
        return block

    def _note_apart(self, worker_id: str) -> None:
        if len(self._apart) >= MAX_KNOWN_APART:
            self._apart.clear()
        self._apart.add(worker_id)
