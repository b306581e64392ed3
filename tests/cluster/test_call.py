"""What commands show to a router, and what they say if it does not let them in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer

from cluster.commands.call import Access
from protos.client import ClientTLS
from protos.tls import Certificates, server_credentials
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc
from tests.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


class Listening(pb_grpc.InferenceServicer):
    """A router that keeps what callers show."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str | bytes]] = []
        self.names: list[list[bytes]] = []

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        self.names.append(list(context.auth_context().get("x509_common_name", ())))
        return pb.TokenizeResponse(ids=[4, 2])


@pytest.fixture
async def listen() -> AsyncIterator[Callable[..., Any]]:
    servers: list[grpc.aio.Server] = []

    async def started(certificates: Certificates | None) -> tuple[Listening, str]:
        server, service = grpc.aio.server(), Listening()
        pb_grpc.add_InferenceServicer_to_server(service, server)
        if certificates is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", server_credentials(certificates))
        await server.start()
        servers.append(server)
        return service, f"127.0.0.1:{port}"

    yield started
    for server in servers:
        await server.stop(None)


async def tokenize(*options: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "cluster.cli", "tokenize", "words", "--timeout", "10", *map(str, options)]
    return await asyncio.to_thread(
        subprocess.run, arguments, capture_output=True, text=True, timeout=60, check=False, env=variables or None
    )


async def test_a_command_shows_its_certificate_and_its_key(
    listen: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    router, alice, key = authority.issue("router"), authority.issue("alice"), tmp_path / "key"
    key.write_text("the-key\n")
    service, address = await listen(authority.certificates(router))
    files = ("--tls-ca", authority.ca_file, "--tls-cert", alice.cert_file, "--tls-key", alice.key_file)
    done = await tokenize("--target", address, *files, "--api-key-file", key)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "4 2", "")
    assert service.names == [[b"alice"]]
    assert service.metadata[0]["authorization"] == "Bearer the-key"


async def test_what_every_call_shows_may_be_in_the_environment(
    listen: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    router, alice, key = authority.issue("router"), authority.issue("alice"), tmp_path / "key"
    key.write_text("the-key\n")
    service, address = await listen(authority.certificates(router))
    done = await tokenize(
        HEADWATER_TARGET=address,
        HEADWATER_TLS_CA=str(authority.ca_file),
        HEADWATER_TLS_CERT=str(alice.cert_file),
        HEADWATER_TLS_KEY=str(alice.key_file),
        HEADWATER_API_KEY_FILE=str(key),
    )
    assert done.returncode == 0
    assert service.metadata[0]["authorization"] == "Bearer the-key"


async def test_who_is_not_let_in_is_told_why_and_what_to_look_at(
    listen: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    _, address = await listen(authority.certificates(authority.issue("router")))
    _, plain = await listen(None)
    for target, options, words in (
        (address, (), "give --tls-ca if its router has TLS"),
        (address, ("--tls-ca", authority.ca_file), "see --tls-ca, --tls-cert and --tls-key"),
        (address, ("--tls-ca", other.ca_file), "certificate is refused: unable to get local issuer certificate"),
        (plain, ("--tls-ca", authority.ca_file), "does not speak TLS"),
    ):
        done = await tokenize("--target", target, *options)
        assert done.returncode == 1
        [told] = [line for line in done.stderr.splitlines() if line.startswith("error:")]  # gRPC has words of its own
        assert words in told


def access(**fields: Any) -> Access:
    nothing = dict.fromkeys(("tls_ca", "tls_cert", "tls_key", "api_key_file"))
    return Access(**{"target": "a:1", **nothing, **fields})


def test_plain_text_unless_a_file_is_given(tmp_path: Path) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca", "cert", "key"))
    assert access().tls is None
    assert access(tls_ca=ca).tls == ClientTLS(ca_file=ca)
    assert access(tls_cert=cert, tls_key=key).tls == ClientTLS(cert_file=cert, key_file=key)
    for half in ({"tls_cert": cert}, {"tls_key": key}):
        with pytest.raises(typer.BadParameter, match="both"):
            _ = access(**half).tls


@pytest.mark.parametrize("content", [b"", b" \n", b"two\nlines", "schlüssel".encode()])
def test_a_key_that_cannot_be_sent_is_refused_and_not_printed(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(typer.BadParameter, match=r"must hold one line of ASCII") as caught:
        _ = access(api_key_file=file).api_key
    assert "two" not in str(caught.value)
