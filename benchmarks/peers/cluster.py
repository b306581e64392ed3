"""Headwater's whole cluster: a client of this process, gRPC, the router, a session, and the worker with the engine.

Client, router and worker share the cores that an engine alone has. Options: a part of the tree below `worker`.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.conditions import revision
from benchmarks.peers.line import Settings, Tokens, main
from benchmarks.peers.ours import base, merged
from cluster.config import from_tree
from cluster.lifecycle import Cluster
from protos.client import Client

T = TypeVar("T")


class WholeCluster:
    """One router and one worker, and a client on an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        worker = merged(merged(base(settings), {"engine": {"threads": settings.threads}}), settings.options)
        tree = {
            "cluster": {"num_workers": 1, "drain_timeout_s": 1},
            "router": {"grpc": {"port": 0}, "metrics": {"port": 0}},
            "worker": {**worker, "metrics": {"port": 0}},
        }
        self._options = settings.options
        self._cluster = Cluster(from_tree(tree, source="the benchmark"))
        self._cluster.start()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="client", daemon=True).start()
        self._client = self._wait(self._connect())
        atexit.register(self._stop)

    def facts(self) -> Mapping[str, object]:
        return {"commit": revision()[0], **self._options}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        for prefix in prefixes:
            self.run([prefix], 1)

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        return self._wait(self._stream_all(prompts, max_tokens))

    async def _stream_all(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        return list(await asyncio.gather(*(self._stream(prompt, max_tokens) for prompt in prompts)))

    async def _stream(self, prompt: Tokens, max_tokens: int) -> Tokens:
        tokens: Tokens = []
        events = self._client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        async for event in events:
            for output in event.outputs:
                tokens += output.token_ids
        return tokens

    async def _connect(self) -> Client:
        return Client(self._cluster.endpoints[0].grpc)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._cluster.stop()


if __name__ == "__main__":
    main(WholeCluster)
