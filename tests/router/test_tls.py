"""TLS on both sides of a router: who is let in, what is said about who is not, and certificates that are replaced."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from protos import errors
from protos.client import ClientTLS
from protos.tls import Certificates, PeerTLS
from router.config import TLSSection
from router.server import RouterServer
from router.session import Session
from tests.certificates import Authority, Issued, serial_of
from tests.router.conftest import ONCE, Cluster, router_config, until
from tests.router.scripted_worker import Emit, ScriptedWorker, answer, deltas

Start = Callable[..., Any]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """Nobody trusts it."""
    return Authority(tmp_path / "other")


@pytest.fixture
async def start_router(tokenizer_dir: Path) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(*, tls: TLSSection | None = None, peer_tls: PeerTLS | None = None) -> Cluster:
            config = router_config()
            server = RouterServer(
                config.model_copy(update={"grpc": config.grpc.model_copy(update={"tls": tls})}),
                model_name="tiny",
                tokenizer_dir=tokenizer_dir,
                session_token="secret",
                router_id="r0",
                peer_tls=peer_tls,
            )
            address = await server.start()
            stack.push_async_callback(server.stop, 0)
            return Cluster(server, address, stack)

        yield start


def tls_section(issued: Issued, client_ca: Authority | None = None) -> TLSSection:
    return TLSSection(
        cert_file=issued.cert_file, key_file=issued.key_file, client_ca_file=client_ca and client_ca.ca_file
    )


def client_tls(ca: Authority, issued: Issued | None = None) -> ClientTLS:
    return ClientTLS(ca.ca_file, issued and issued.cert_file, issued and issued.key_file)


async def tokenizes(cluster: Cluster, tls: ClientTLS | None) -> bool:
    client = await cluster.client(tls=tls, timeout_s=10.0)
    try:
        return await client.tokenize("w5") == (0, 5)
    except errors.NoWorker:
        return False


async def test_a_client_with_a_certificate_is_let_in_and_no_other(
    start_router: Start, authority: Authority, other: Authority
) -> None:
    cluster = await start_router(tls=tls_section(authority.issue("router"), authority))
    assert await tokenizes(cluster, client_tls(authority, authority.issue("client")))
    assert not await tokenizes(cluster, client_tls(authority))
    assert not await tokenizes(cluster, client_tls(authority, authority.expired("expired")))
    assert not await tokenizes(cluster, client_tls(authority, other.issue("stranger")))
    assert not await tokenizes(cluster, None)
    assert await tokenizes(cluster, client_tls(authority, authority.issue("another")))


async def test_without_an_authority_for_them_clients_need_no_certificate(
    start_router: Start, authority: Authority
) -> None:
    cluster = await start_router(tls=tls_section(authority.issue("router")))
    assert await tokenizes(cluster, client_tls(authority))
    assert not await tokenizes(cluster, None)


async def test_a_router_that_is_not_who_it_says_is_not_spoken_to(
    start_router: Start, authority: Authority, other: Authority
) -> None:
    for issued in (other.issue("router"), authority.expired("router"), authority.issue("elsewhere", ip="192.0.2.1")):
        cluster = await start_router(tls=tls_section(issued))
        assert not await tokenizes(cluster, client_tls(authority))


async def test_a_file_that_cannot_be_used_is_named(start_router: Start, authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue("router")
    missing = TLSSection(cert_file=issued.cert_file, key_file=issued.key_file, client_ca_file=tmp_path / "no.pem")
    with pytest.raises(errors.SetupError, match=r"`router\.grpc\.tls\.client_ca_file`: .*no\.pem cannot be read"):
        await start_router(tls=missing)
    peer = PeerTLS(issued.cert_file, tmp_path / "no.key", authority.ca_file)
    with pytest.raises(errors.SetupError, match=r"`cluster\.tls\.key_file`: .*no\.key cannot be read"):
        await start_router(peer_tls=peer)


class Gate:
    """A script that makes a token each time it is opened."""

    def __init__(self) -> None:
        self._opened = asyncio.Semaphore(0)

    def open(self) -> None:
        self._opened.release()

    async def __call__(self, request: Any, emit: Emit) -> None:
        for delta in deltas(request, request.sampling.max_tokens):
            await self._opened.acquire()
            emit(delta)


async def shown_at(address: str, client: Issued | None = None) -> int:
    """The serial number of the certificate that a server shows now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if client is not None:
        context.load_cert_chain(client.cert_file, client.key_file)
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return serial_of(ssl.DER_cert_to_PEM_cert(shown).encode())


async def test_a_new_certificate_is_shown_to_new_clients_and_old_streams_go_on(
    start_router: Start, authority: Authority
) -> None:
    """On both sides of the router at once."""
    router, worker, peer = (authority.issue(name) for name in ("router", "worker", "peer"))
    cluster = await start_router(tls=tls_section(router), peer_tls=authority.peer(peer))
    gate = Gate()
    scripted = await started(cluster, gate, authority.certificates(worker))
    tls = client_tls(authority)
    client = await cluster.client(tls=tls)
    async with aclosing(client.generate("w5", max_tokens=4)) as events:
        gate.open()
        await anext(events)
        for issued in (router, worker, peer):
            issued.replace(authority.issue("renewed"))
        renewed = serial_of(router.cert_file.read_bytes())
        assert renewed != router.serial
        assert await shown_at(cluster.address.grpc) == renewed
        renewed = serial_of(worker.cert_file.read_bytes())
        assert renewed != worker.serial
        assert await shown_at(cluster.members["w0"], peer) == renewed
        assert await tokenizes(cluster, tls)
        for _ in range(3):
            gate.open()
        tokens = [output.token_ids async for event in events for output in event.outputs]
    assert sum(map(len, tokens)) == 3
    assert scripted.num_sessions == 1


# Sessions with workers


async def started(cluster: Cluster, script: Any, certificates: Certificates | None) -> ScriptedWorker:
    """A worker that the router knows of; connected or not."""
    worker = ScriptedWorker("w0", script, certificates=certificates)
    cluster.members["w0"] = await worker.start()
    cluster.stack.push_async_callback(worker.kill)
    cluster.server.set_workers(cluster.members)
    return worker


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Every attempt at a session, by what made it."""
    made: list[Session] = []
    connection = Session._connection

    async def noted(session: Session) -> Any:
        made.append(session)
        return await connection(session)

    monkeypatch.setattr(Session, "_connection", noted)
    return made


async def test_members_with_certificates_have_sessions(start_router: Start, authority: Authority) -> None:
    cluster = await start_router(peer_tls=authority.peer(authority.issue("router")))
    worker = await started(cluster, answer(4), authority.certificates(authority.issue("worker")))
    await until(lambda: cluster.server.num_connected == 1)
    assert worker.metadata["headwater-session-token"] == "secret"  # the second factor
    completion = await (await cluster.client()).complete("w5", max_tokens=4)
    assert len(completion.outputs[0].token_ids) == 4


HUNG_UP = "the other side hung up at once: it refuses this side's certificate, or only one of the two sides uses TLS"
ROUTERS = {"plain": HUNG_UP, "expired": HUNG_UP, "other authority": HUNG_UP}
WORKERS = {
    "plain": "the other side does not speak TLS",
    "expired": "the other side's certificate is refused: certificate has expired",
    "other authority": "the other side's certificate is refused: unable to get local issuer certificate",
    "wrong name": "the other side's certificate is for another name",
}


def strange_peer(kind: str, authority: Authority, other: Authority) -> PeerTLS | None:
    match kind:
        case "plain":
            return None
        case "expired":
            return authority.peer(authority.expired("expired"))
        case "other authority":
            issued = other.issue("stranger")
            return PeerTLS(issued.cert_file, issued.key_file, authority.ca_file)
        case _:
            return authority.peer(authority.issue("elsewhere", host="elsewhere.internal"))


async def expect_no_session(
    cluster: Cluster, attempts: list[Session], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tried several times, told once."""
    await until(lambda: len(attempts) >= 4)
    assert {session.state for session in attempts} == {"connecting"}
    assert cluster.server.num_connected == 0
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert said == [f"no session with worker w0 at {cluster.members['w0']}: {reason}"]
    with pytest.raises(errors.NoWorker):
        await (await cluster.client(retry=ONCE)).complete("w5")
    cluster.server.check()


@pytest.mark.parametrize("kind", ROUTERS)
async def test_a_strange_router_has_no_session(
    start_router: Start,
    authority: Authority,
    other: Authority,
    attempts: list[Session],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    cluster = await start_router(peer_tls=strange_peer(kind, authority, other))
    worker = await started(cluster, answer(4), authority.certificates(authority.issue("worker")))
    await expect_no_session(cluster, attempts, ROUTERS[kind], caplog)
    assert worker.num_sessions == 0


@pytest.mark.parametrize("kind", WORKERS)
async def test_a_strange_worker_has_no_session(
    start_router: Start,
    authority: Authority,
    other: Authority,
    attempts: list[Session],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    cluster = await start_router(peer_tls=authority.peer(authority.issue("router")))
    peer = strange_peer(kind, authority, other)
    worker = await started(cluster, answer(4), peer and Certificates.of_peer(peer))
    await expect_no_session(cluster, attempts, WORKERS[kind], caplog)
    assert worker.num_sessions == 0


async def test_a_session_comes_up_when_its_certificate_has_been_replaced(
    start_router: Start, authority: Authority, attempts: list[Session]
) -> None:
    """Without a restart of either side."""
    issued = authority.expired("router")
    cluster = await start_router(peer_tls=authority.peer(issued))
    await started(cluster, answer(4), authority.certificates(authority.issue("worker")))
    await until(lambda: len(attempts) >= 2)
    assert cluster.server.num_connected == 0
    issued.replace(authority.issue("renewed"))
    await until(lambda: cluster.server.num_connected == 1)
