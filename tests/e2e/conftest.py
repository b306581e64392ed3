"""One real cluster for the whole session: real Ray, real gRPC, the model that ships."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config import HeadwaterConfig, load
from cluster.lifecycle import Cluster
from protos.client import Client, RetryPolicy

HEADWATER = Path(sys.executable).with_name("headwater")  # the command line
NUM_WORKERS = 2
SETTINGS = (
    f"cluster.num_workers={NUM_WORKERS}",
    "cluster.drain_timeout_s=2",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "router.limits.max_queued_requests=24",
    "router.sessions.max_in_flight=40",
    "router.limits.max_continuations=16",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=1024",
    "worker.engine.speculation.drafters=[copy, pool]",
    "cluster.num_drafters=1",
    "drafter.drafters=[recycle, model]",
    "drafter.metrics.port=0",
)


@pytest.fixture(scope="session")
def collector_port() -> int:
    """Where traces go of requests whose caller wants one. Nobody listens until a test does: Ray forks this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def config(root: Path, collector_port: int) -> HeadwaterConfig:
    traced = ("cluster.tracing.sample_ratio=0", f"cluster.tracing.endpoint=127.0.0.1:{collector_port}")
    return load(None, [*SETTINGS, *traced, f"worker.model.path={root / 'models' / 'target'}"])


@pytest.fixture(scope="session")
def cluster(config: HeadwaterConfig) -> Iterator[Cluster]:
    with Cluster(config) as running:
        yield running


@pytest.fixture
def target(cluster: Cluster) -> str:
    """Where the router listens."""
    return cluster.endpoints[0].grpc


@pytest.fixture
async def client(target: str) -> AsyncIterator[Client]:
    """A client that sends nothing twice."""
    async with Client(target, timeout_s=60, retry=RetryPolicy(max_attempts=1)) as one:
        yield one


def worker_processes() -> list[psutil.Process]:
    """The worker replicas among this process's descendants."""
    return replicas("Worker")


def drafter_processes() -> list[psutil.Process]:
    """The drafter replicas among this process's descendants."""
    return replicas("Drafter")


def replicas(deployment: str) -> list[psutil.Process]:
    """Of one deployment, among this process's descendants."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if f"ServeReplica:headwater:{deployment}" in " ".join(command(child))]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
