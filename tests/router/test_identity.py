"""Credentials, as they arrive: over plain text, and over mutual TLS with a real handshake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.identity import credentials
from tests.certificates import Authority

Found = tuple[str | None, tuple[str, ...]]


class Witness(grpc.GenericRpcHandler):
    """Answers every call and keeps what credentials came with the last one."""

    def __init__(self) -> None:
        self.found: Found | None = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        self.found = credentials(context)
        return b""


async def found_by_call(
    metadata: Sequence[tuple[str, str | bytes]] = (),
    *,
    server_tls: grpc.ServerCredentials | None = None,
    client_tls: grpc.ChannelCredentials | None = None,
) -> Found:
    """What a server finds in one call over loopback."""
    server, witness = grpc.aio.server(), Witness()
    server.add_generic_rpc_handlers((witness,))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, server_tls) if server_tls else server.add_insecure_port(address)
    await server.start()
    target = f"127.0.0.1:{port}"
    channel = grpc.aio.secure_channel(target, client_tls) if client_tls else grpc.aio.insecure_channel(target)
    try:
        async with channel:
            await channel.unary_unary("/any/Method")(b"", metadata=metadata)
    finally:
        await server.stop(None)
    assert witness.found is not None
    return witness.found


@pytest.mark.parametrize(
    ("metadata", "api_key"),
    [
        ([], None),
        ([("authorization", "Bearer hw-a")], "hw-a"),
        ([("authorization", "bEARER  hw-a ")], "hw-a"),
        ([("x-api-key", "hw-b")], "hw-b"),
        ([("authorization", "Bearer hw-a"), ("x-api-key", "hw-b")], "hw-b"),
        ([("x-api-key", ""), ("authorization", "Bearer hw-a")], "hw-a"),
        ([("x-api-key", "hw-b"), ("x-api-key", "hw-c")], "hw-b"),
        ([("authorization", "Basic aHctYQ==")], None),
        ([("authorization", "Bearer")], None),
        ([("authorization", "hw-a")], None),
        ([("x-api-key-bin", b"hw-a")], None),
    ],
)
async def test_the_key_is_found_in_metadata(metadata: list[tuple[str, str | bytes]], api_key: str | None) -> None:
    assert await found_by_call(metadata) == (api_key, ())


async def test_the_names_of_a_client_certificate_are_found(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    server = authority.issue("server")
    client = authority.issue("client", host="client.acme.example", common_name="acme gateway")
    ca = authority.ca_file.read_bytes()
    key, subjects = await found_by_call(
        [("x-api-key", "hw-a")],
        server_tls=grpc.ssl_server_credentials(
            [(server.key_file.read_bytes(), server.cert_file.read_bytes())],
            root_certificates=ca,
            require_client_auth=True,
        ),
        client_tls=grpc.ssl_channel_credentials(ca, client.key_file.read_bytes(), client.cert_file.read_bytes()),
    )
    assert key == "hw-a"
    assert subjects[0] == "client.acme.example"
    assert subjects[-1] == "acme gateway"


async def test_a_client_without_certificate_has_no_names(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    server = authority.issue("server")
    found = await found_by_call(
        server_tls=grpc.ssl_server_credentials([(server.key_file.read_bytes(), server.cert_file.read_bytes())]),
        client_tls=grpc.ssl_channel_credentials(authority.ca_file.read_bytes()),
    )
    assert found == (None, ())
