"""A running router over loopback, scripted workers behind it, a client in front."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from protos.client import Client, RetryPolicy
from protos.tracing import Tracing
from router.api_key import key_hash
from router.config import (
    DispatchSection,
    GrpcSection,
    LimitsSection,
    MetricsSection,
    RecoverySection,
    RouterConfig,
    RoutingSection,
    SessionsSection,
    TenantsSection,
)
from router.server import RouterAddress, RouterServer
from tests.router.scripted_worker import Script, ScriptedWorker, answer

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words `w2` … `w99` stand for ids 2 … 99; a text begins with <bos>, id 0."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocab = {"<bos>": 0, "<unk>": 1} | {f"w{token_id}": token_id for token_id in range(2, 100)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def router_config(
    *,
    sessions: dict[str, Any] | None = None,
    recovery: dict[str, Any] | None = None,
    dispatch: dict[str, Any] | None = None,
    routing: dict[str, Any] | None = None,
    tenants: dict[str, Any] | None = None,
    **limits: Any,
) -> RouterConfig:
    """Free ports and short times."""
    times = {"watchdog_s": 0.5, "connect_timeout_s": 2.0, "reconnect_first_s": 0.02, "reconnect_max_s": 0.1}
    return RouterConfig(
        grpc=GrpcSection(port=0, max_message_bytes=64 << 10),
        metrics=MetricsSection(port=0),
        limits=LimitsSection(**{"no_worker_grace_s": 0.3, "max_continuations": 4} | limits),
        sessions=SessionsSection(**times | (sessions or {})),
        recovery=RecoverySection(**recovery or {}),
        dispatch=DispatchSection(**dispatch or {}),
        routing=RoutingSection(**routing or {}),
        tenants=TenantsSection(**tenants or {}),
    )


@dataclass
class Keys:
    """Three tenants' keys, and the file that knows them."""

    file: Path
    admin: str = "hw-key-of-the-operator"
    acme: str = "hw-key-of-acme"
    globex: str = "hw-key-of-globex"

    def write(self, **limits: dict[str, Any]) -> None:
        """Limits by tenant."""
        entries = {
            name: {"keys": [key_hash(getattr(self, name))], "is_admin": name == "admin"} | limits.get(name, {})
            for name in ("admin", "acme", "globex")
        }
        self.file.write_text(yaml.safe_dump({"tenants": entries}))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "tenants.yaml")
    keys.write()
    return keys


@dataclass
class Cluster:
    """One router, its workers and its clients. Cleaned up by the fixture."""

    server: RouterServer
    address: RouterAddress
    stack: AsyncExitStack
    workers: dict[str, ScriptedWorker] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)

    async def add_worker(self, worker_id: str, script: Script | None = None, **options: Any) -> ScriptedWorker:
        """A worker that is connected when this returns."""
        worker = ScriptedWorker(worker_id, script or answer(4), **options)
        self.members[worker_id] = await worker.start()
        self.stack.push_async_callback(worker.kill)
        self.workers[worker_id] = worker
        self.server.set_workers(self.members)
        await self.wait_connected()
        return worker

    def remove_worker(self, worker_id: str) -> None:
        del self.members[worker_id]
        self.server.set_workers(self.members)

    async def wait_connected(self) -> None:
        await until(lambda: self.server.num_connected == len(self.members))

    async def client(self, **options: Any) -> Client:
        return await self.stack.enter_async_context(Client(self.address.grpc, **{"retry": ONCE} | options))


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  polls any condition
            await asyncio.sleep(0.005)


async def until_async(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait until the awaited condition holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def start_cluster(tokenizer_dir: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts routers; stops them and checks their invariants at the end."""
    async with AsyncExitStack() as stack:

        async def start(*, tracing: Tracing | None = None, **options: Any) -> Cluster:
            server = RouterServer(
                router_config(**options),
                model_name="tiny",
                tokenizer_dir=tokenizer_dir,
                session_token="secret",
                router_id="r0",
                tracing=tracing,
            )
            address = await server.start()
            stack.push_async_callback(_stop, server)
            return Cluster(server, address, stack)

        yield start


async def _stop(server: RouterServer) -> None:
    server.check()
    await server.stop(0.2)


@pytest.fixture
async def cluster(start_cluster: Callable[..., Any]) -> Cluster:
    """One router with one worker, w0, that answers at most four tokens."""
    cluster: Cluster = await start_cluster()
    await cluster.add_worker("w0")
    return cluster


@pytest.fixture
async def client(cluster: Cluster) -> Client:
    return await cluster.client()
