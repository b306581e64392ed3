"""A Ray cluster of three nodes on this one machine, with Headwater on it: a script, because a process has one Ray.

`python -m tests.e2e.nodes FOLDER` keeps Ray's files in FOLDER, and prints as JSON what ran where and what it said.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster as Nodes

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client
from tests.metrics import scrape

NUM_WORKERS = NUM_DRAFTERS = 2
ROLE = "headwater/role"
PROMPTS = [f"def f{i}(a, b):\n    return a + {i}\n\n\ndef g{i}(" for i in range(12)]
WAYS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 11}]
NUM_TOKENS = 160
MAX_ROUNDS = 20  # until drafts were right at every worker
ACCEPTED = "headwater_accepted_draft_tokens_total"
SETTINGS = (
    f"cluster.num_workers={NUM_WORKERS}",
    f"cluster.num_drafters={NUM_DRAFTERS}",
    f"cluster.router_labels={{{ROLE}: router}}",
    f"cluster.worker_labels={{{ROLE}: worker}}",
    f"cluster.drafter_labels={{{ROLE}: drafter}}",
    "cluster.worker_gpus=1",
    "cluster.drafter_gpus=1",
    "cluster.ready_timeout_s=240",
    "cluster.drain_timeout_s=2",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=512",
    "worker.engine.speculation.drafters=[pool]",
    "drafter.drafters=[recycle, model]",
    "drafter.metrics.port=0",
    "drafter.kv.num_pages=512",
)


@dataclass(frozen=True)
class Place:
    """Where an actor runs."""

    node: str
    devices: tuple[str, ...]  # that Ray gave it
    visible: str  # to its libraries


@dataclass(frozen=True)
class Outcome:
    """What the test wants to know."""

    nodes: dict[str, str]  # role to node
    routers: list[Place]
    workers: list[Place]
    drafters: list[Place]
    plain: list[str]
    drafted: list[list[str]]  # as often as it took
    connected: list[float]  # drafters, by worker
    accepted: list[float]  # tokens, by worker
    drafts: list[float]  # by drafter
    processes: list[tuple[int, float]]  # all of them: id and time of creation


@contextmanager
def three_nodes(folder: Path) -> Iterator[Nodes]:
    """A head with the router, a node for workers and one for drafters, with a device for each; none is real."""
    os.environ["RAY_TMPDIR"] = str(folder)  # whatever Ray writes, it writes there
    (folder / "ray").mkdir()
    alike = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "temp_dir": str(folder)}
    nodes = Nodes()
    try:
        nodes.add_node(labels={ROLE: "router"}, **alike)
        nodes.add_node(num_gpus=NUM_WORKERS, labels={ROLE: "worker"}, **alike)
        nodes.add_node(num_gpus=NUM_DRAFTERS, labels={ROLE: "drafter"}, **alike)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def places(deployment: str) -> list[Place]:
    """Of all replicas of one deployment."""

    def here(_: object) -> Place:
        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids()["GPU"]
        return Place(context.get_node_id(), tuple(devices), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    found = ray.util.list_named_actors(all_namespaces=True)
    actors = [ray.get_actor(**actor) for actor in found if f"headwater#{deployment}#" in actor["name"]]
    answers: list[Place] = ray.get([actor.__ray_call__.remote(here) for actor in actors], timeout=60)
    return answers


async def texts(target: str, **options: Any) -> list[str]:
    """Of every prompt in every way, all at once."""
    async with Client(target, timeout_s=120) as client:
        calls = [
            client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **way, **options)
            for prompt in PROMPTS
            for way in WAYS
        ]
        return [answer.text for answer in await asyncio.gather(*calls)]


def scraped(addresses: Iterable[str], metric: str) -> list[float]:
    return [scrape(address)[metric] for address in addresses]


def observe(cluster: Cluster) -> Outcome:
    target = cluster.endpoints[0].grpc
    plain = asyncio.run(texts(target, speculation="off"))
    drafted = [asyncio.run(texts(target))]
    while min(scraped(cluster.worker_metrics(), ACCEPTED)) == 0 and len(drafted) < MAX_ROUNDS:
        drafted.append(asyncio.run(texts(target)))
    return Outcome(
        {node["Labels"][ROLE]: node["NodeID"] for node in ray.nodes() if ROLE in node["Labels"]},
        places("Router"),
        places("Worker"),
        places("Drafter"),
        plain,
        drafted,
        scraped(cluster.worker_metrics(), "headwater_pool_drafters"),
        scraped(cluster.worker_metrics(), ACCEPTED),
        scraped(cluster.drafter_metrics(), "headwater_drafter_drafts_total"),
        [(child.pid, child.create_time()) for child in psutil.Process().children(recursive=True)],
    )


def main(folder: Path) -> None:
    with three_nodes(folder) as nodes, Cluster(load(None, [*SETTINGS, f"cluster.ray.address={nodes.address}"])) as run:
        outcome = observe(run)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
