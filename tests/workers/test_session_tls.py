"""The session server with certificates: members that also know the token are served, and nobody else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from protos.errors import SetupError
from protos.tls import DEFAULT_SERVER_NAME, PeerTLS
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc
from tests.certificates import Authority, Issued
from workers.config import EngineSection, MetricsSection, ModelSection, WorkerConfig
from workers.server import TOKEN_KEY, WorkerAddress, WorkerServer

TOKEN = "secret"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@asynccontextmanager
async def running(target_dir: Path, tls: PeerTLS) -> AsyncIterator[WorkerAddress]:
    config = WorkerConfig(
        model=ModelSection(path=target_dir), engine=EngineSection(kind="fake"), metrics=MetricsSection(port=0)
    )
    server = WorkerServer(config, worker_id="w0", session_token=TOKEN, tls=tls)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop()


async def greeting(
    address: WorkerAddress, ca: Authority, issued: Issued | None, *, token: str = TOKEN
) -> pb.WorkerHello:
    """What a router hears first. Raises AioRpcError."""
    cert, key = (issued.cert_file.read_bytes(), issued.key_file.read_bytes()) if issued else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.ca_file.read_bytes(), key, cert)
    options = [("grpc.ssl_target_name_override", DEFAULT_SERVER_NAME), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address.session, credentials, options=options) as channel:
        call = rpc.WorkerSessionStub(channel).Session(metadata=((TOKEN_KEY, token),))
        frame = await asyncio.wait_for(call.read(), 10)
        assert isinstance(frame, pb.WorkerFrame)
        return frame.hello


async def test_a_member_that_knows_the_token_is_greeted(target_dir: Path, authority: Authority) -> None:
    async with running(target_dir, authority.peer(authority.issue("worker"))) as address:
        assert (await greeting(address, authority, authority.issue("router"))).worker_id == "w0"


async def test_a_certificate_does_not_stand_in_for_the_token(target_dir: Path, authority: Authority) -> None:
    async with running(target_dir, authority.peer(authority.issue("worker"))) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await greeting(address, authority, authority.issue("router"), token="guessed")
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_the_token_does_not_stand_in_for_a_certificate(
    target_dir: Path, authority: Authority, tmp_path: Path
) -> None:
    strangers = [None, authority.expired("expired"), Authority(tmp_path / "other").issue("stranger")]
    async with running(target_dir, authority.peer(authority.issue("worker"))) as address:
        for issued in strangers:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await greeting(address, authority, issued)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert (await greeting(address, authority, authority.issue("router"))).worker_id == "w0"


async def test_a_worker_without_its_files_does_not_start(target_dir: Path, authority: Authority) -> None:
    issued = authority.issue("worker")
    issued.key_file.unlink()
    with pytest.raises(SetupError, match=r"`cluster\.tls\.key_file`: .*worker\.key cannot be read"):
        async with running(target_dir, authority.peer(issued)):
            pass
