"""Two workers that share no memory, on one Ray: a script, because a process has one Ray.

`python -m tests.e2e.exchange FOLDER [SETTING ...]` keeps its files in FOLDER, and prints as JSON what the workers said
of one prompt: that which computed its prefix, and the other, which was told where it is.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.messages import Delta, PrefixSource, Request, Sampling
from tests.metrics import scrape
from tests.workers.test_server import TOKEN, Session

PREFIX = tuple((7 * i) % 3900 + 1 for i in range(512))
SETTINGS = (
    "cluster.num_workers=2",
    "cluster.ready_timeout_s=240",
    "cluster.drain_timeout_s=2",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=256",
    "worker.engine.kv.exchange.directory=/dev/null/nowhere",
    "worker.engine.kv.exchange.min_tokens=32",
    "worker.engine.kv.exchange.timeout_s=60",
)


@dataclass(frozen=True)
class Address:
    """Of a worker."""

    worker_id: str
    session: str
    metrics: str


def workers() -> list[Address]:
    def here(_: object) -> Address:
        context = serve.get_replica_context()
        address = context.servable_object._address
        return Address(context.replica_id.unique_id, address.session, address.metrics)

    found = ray.util.list_named_actors(all_namespaces=True)
    actors = [ray.get_actor(**actor) for actor in found if "headwater#Worker#" in actor["name"]]
    answers: list[Address] = ray.get([actor.__ray_call__.remote(here) for actor in actors], timeout=60)
    return answers


async def answer(worker: Address, source: PrefixSource | None) -> tuple[int, list[int]]:
    """Tokens found in the cache, and tokens made."""
    session = Session(worker.session)
    sampling = Sampling(seed=1, max_tokens=8, temperature=0.0, ignore_eos=True)
    await session.submit(Request("a", (*PREFIX, 5, 6, 7), sampling, prefix_source=source))
    deltas = [delta for delta in await session.deltas("a") if isinstance(delta, Delta)]
    await session.channel.close()
    return deltas[0].cached_tokens or 0, [token for delta in deltas for token in delta.token_ids]


async def observe() -> dict[str, object]:
    maker, user = workers()
    made = await answer(maker, None)
    used = await answer(user, PrefixSource(maker.worker_id, maker.session, len(PREFIX)))
    seen = scrape(user.metrics)
    return {
        "made": made,
        "used": used,
        "fetched": seen["headwater_prefix_fetched_tokens_total"],
        "foreign": seen["headwater_kv_pages_foreign"],
        "cached": seen["headwater_kv_pages_cached"],
    }


def main(folder: Path, *settings: str) -> None:
    (folder / "token").write_text(TOKEN)
    with Cluster(load(None, [*SETTINGS, f"cluster.session_token_file={folder / 'token'}", *settings])):
        outcome = asyncio.run(observe())
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
