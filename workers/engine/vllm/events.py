"""What vLLM's prefix cache holds, in our names of blocks: told by its scheduler's process over a local socket."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from protos.blocks import chain_hashes, root_hash
from workers.engine.vllm.requests import SALT
from workers.kv.journal import Changes, Journal

NUMBER_BYTES = 8
REPLAY_TIMEOUT_MS = 1000


class BlockNames:
    """The blocks that are cached now, by vLLM's hashes and by our names. Mutated only by KVEventReader.

    vLLM may hold a block twice, computed by two outputs at once: it is gone when both are.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._names: dict[Any, int] = {}  # by vLLM's hash
        self._held: set[int] = set()  # the same names
        self._copies: Counter[Any] = Counter()
        self._journal = Journal()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: int) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def take_changes(self) -> Changes:
        """Since they were last taken."""
        return self._journal.take()

    def apply(self, event: object) -> None:
        """The cache has changed."""
        match event:
            case BlockStored():
                self._store(event)
            case BlockRemoved():
                self._remove(event.block_hashes)
            case AllBlocksCleared():
                self._copies.clear()
                self._journal.remove(self._held)
                self._names.clear()
                self._held.clear()

    def _store(self, event: BlockStored) -> None:
        parent = self._parent(event)
        if parent is None or event.block_size != self._block_size:
            return  # of a block that has gone since, or of no whole block
        names = chain_hashes(parent, array("i", event.token_ids).tobytes(), self._block_size)
        for key, name in zip(event.block_hashes, names, strict=True):
            self._copies[key] += 1
            if key not in self._names:
                self._names[key] = name
                self._held.add(name)
                self._journal.store([name])

    def _parent(self, event: BlockStored) -> int | None:
        if event.parent_block_hash is not None:
            return self._names.get(event.parent_block_hash)
        keys = event.extra_keys[0] if event.extra_keys else None
        salt = next((key for key in keys or () if isinstance(key, str) and key.startswith(SALT)), SALT)
        return root_hash(salt.removeprefix(SALT), self._block_size)

    def _remove(self, keys: Sequence[Any]) -> None:
        for key in keys:
            self._copies[key] -= 1
            if self._copies[key] <= 0:
                del self._copies[key]
                if (name := self._names.pop(key, None)) is not None:
                    self._held.discard(name)
                    self._journal.remove([name])


class KVEventReader:
    """Reads the events that have come. Used from the engine's thread alone, which closes it."""

    def __init__(self, endpoint: str, replay_endpoint: str, block_size: int) -> None:
        self.names = BlockNames(block_size)
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._replay_endpoint = replay_endpoint
        self._next = 0  # number of the batch that is due

    def read(self) -> None:
        """Take in what has come."""
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            _, number, payload = self._socket.recv_multipart()
            self._take(int.from_bytes(number, "big"), payload)

    def close(self) -> None:
        """Idempotent."""
        self._context.destroy(linger=0)

    def _take(self, number: int, payload: bytes) -> None:
        if number > self._next:
            self._catch_up(number)
        if number == self._next:
            self._apply(payload)

    def _apply(self, payload: bytes) -> None:
        for event in self._decoder.decode(payload).events:
            self.names.apply(event)
        self._next += 1

    def _catch_up(self, number: int) -> None:
        """Ask for the batches before this one that did not come: those from before this reader was heard of."""
        with self._context.socket(zmq.DEALER) as socket:
            socket.connect(self._replay_endpoint)
            socket.send_multipart([b"", self._next.to_bytes(NUMBER_BYTES, "big")])
            while self._next < number and socket.poll(REPLAY_TIMEOUT_MS):
                *_, found, payload = socket.recv_multipart()
                if not payload:  # the end
                    break
                if int.from_bytes(found, "big", signed=True) == self._next:
                    self._apply(payload)
        self._next = max(self._next, number)  # what is lost for good costs the router a few wrong guesses
