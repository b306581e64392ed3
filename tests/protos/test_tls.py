"""Certificates from files: what is taken, what is refused, and what happens when the files change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from protos.errors import SetupError
from protos.tls import DEFAULT_SERVER_NAME, Certificates, grpc_reason, server_credentials
from tests.certificates import Authority, Issued, serial_of


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def shake_hands(server: Certificates, client: Certificates) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a connection in memory. Raises what the first of them finds wrong."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.connect(to_client, to_server), server.accept(to_server, to_client)
    for end in ends * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends


def test_members_know_each_other(authority: Authority) -> None:
    server, client = authority.issue("server"), authority.issue("client")
    seen_by_client, seen_by_server = shake_hands(authority.certificates(server), authority.certificates(client))
    for end, other in ((seen_by_client, server), (seen_by_server, client)):
        shown = end.getpeercert(binary_form=True)
        assert shown is not None
        assert serial_of(ssl.DER_cert_to_PEM_cert(shown).encode()) == other.serial
        assert end.version() == "TLSv1.3"


def test_every_connection_shows_its_certificate_anew(authority: Authority) -> None:
    """Nothing is resumed: a session of yesterday would be one whose certificate nobody looks at."""
    certificates = authority.certificates(authority.issue("member"))
    client, _ = shake_hands(certificates, certificates)
    with pytest.raises(ssl.SSLWantReadError):
        client.read()
    assert client.session is None or not client.session.has_ticket


def expired(authority: Authority, other: Authority) -> Certificates:
    return authority.certificates(authority.expired("expired"))


def of_another_authority(authority: Authority, other: Authority) -> Certificates:
    issued = other.issue("stranger")
    return Certificates(issued.cert_file, issued.key_file, authority.ca_file, section="cluster.tls")


@pytest.mark.parametrize("make", [expired, of_another_authority])
def test_who_shows_another_certificate_is_refused_on_either_side(
    authority: Authority, tmp_path: Path, make: Callable[[Authority, Authority], Certificates]
) -> None:
    good, bad = authority.certificates(authority.issue("member")), make(authority, Authority(tmp_path / "other"))
    for server, client in ((good, bad), (bad, good)):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(server, client)


def test_a_server_of_another_name_is_refused(authority: Authority) -> None:
    good = authority.certificates(authority.issue("member"))
    other = authority.certificates(authority.issue("elsewhere", host="elsewhere.internal"))
    with pytest.raises(ssl.SSLCertVerificationError, match=r"headwater\.internal"):
        shake_hands(other, good)
    shake_hands(other, authority.certificates(authority.issue("knowing"), server_name="elsewhere.internal"))


def test_who_shows_nothing_is_refused(authority: Authority) -> None:
    certificates = authority.certificates(authority.issue("member"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.ca_file)
    client = context.wrap_bio(to_client, to_server, server_hostname=DEFAULT_SERVER_NAME)
    server = certificates.accept(to_server, to_client)
    for end in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            end.do_handshake()
    client.do_handshake()
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        server.do_handshake()


def test_older_protocols_are_refused(authority: Authority) -> None:
    certificates = authority.certificates(authority.issue("member"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = context.wrap_bio(to_client, to_server, server_hostname=DEFAULT_SERVER_NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        certificates.accept(to_server, to_client).do_handshake()


# Files


@pytest.mark.parametrize("kind", ["cert_file", "key_file", "ca_file"])
def test_a_file_that_is_missing_is_named_with_its_key(authority: Authority, kind: str) -> None:
    issued = authority.issue("member")
    files = {"cert_file": issued.cert_file, "key_file": issued.key_file, "ca_file": authority.ca_file}
    files[kind].unlink()
    with pytest.raises(SetupError, match=rf"`cluster\.tls\.{kind}`: {files[kind]} cannot be read"):
        Certificates(**files, section="cluster.tls")


@pytest.mark.parametrize("kind", ["cert_file", "key_file", "ca_file"])
@pytest.mark.parametrize(
    "content", [b"", b"not PEM at all", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_is_no_pem_is_named(authority: Authority, kind: str, content: bytes) -> None:
    issued = authority.issue("member")
    files = {"cert_file": issued.cert_file, "key_file": issued.key_file, "ca_file": authority.ca_file}
    files[kind].write_bytes(content)
    with pytest.raises(SetupError, match=str(files[kind])):
        Certificates(**files, section="cluster.tls")


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(SetupError, match=r"other\.key is not the key of .*one\.pem \(key values mismatch\)"):
        Certificates(one.cert_file, other.key_file, authority.ca_file, section="cluster.tls")


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(authority: Authority) -> None:
    issued = authority.issue("member")
    key = load_pem_private_key(issued.key_file.read_bytes(), password=None)
    secured = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"long enough"))
    issued.key_file.write_bytes(secured)
    assert b"ENCRYPTED" in issued.key_file.read_bytes()
    with pytest.raises(SetupError, match="without a password"):
        authority.certificates(issued)


# Rotation


def fetched(certificates: Certificates) -> list[bytes]:
    return [certificates.pems().cert, certificates.pems().key]


def contents(issued: Issued) -> list[bytes]:
    return [issued.cert_file.read_bytes(), issued.key_file.read_bytes()]


def serial_shown(server: Certificates, client: Certificates) -> int:
    end, _ = shake_hands(server, client)
    shown = end.getpeercert(binary_form=True)
    assert shown is not None
    return serial_of(ssl.DER_cert_to_PEM_cert(shown).encode())


def test_new_files_are_used_from_the_next_connection_on(authority: Authority) -> None:
    issued, renewed = authority.issue("member"), authority.issue("renewed")
    certificates, client = authority.certificates(issued), authority.certificates(authority.issue("client"))
    assert certificates.pems() is certificates.pems()
    before = issued.serial
    assert serial_shown(certificates, client) == before
    issued.replace(renewed)
    assert serial_shown(certificates, client) == renewed.serial
    assert fetched(certificates) == contents(renewed)


def test_an_authority_may_be_added_and_then_removed(authority: Authority, tmp_path: Path) -> None:
    """How a cluster moves to another authority."""
    other = Authority(tmp_path / "other")
    server, client = authority.certificates(authority.issue("server")), other.certificates(other.issue("client"))
    other_ca, own_ca = other.ca_file.read_bytes(), authority.ca_file.read_bytes()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client)
    authority.ca_file.write_bytes(own_ca + other_ca)
    other.ca_file.write_bytes(own_ca + other_ca)
    shake_hands(server, client)
    authority.ca_file.write_bytes(own_ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client)


def half_written(issued: Issued, renewed: Issued) -> None:
    issued.cert_file.write_bytes(renewed.cert_file.read_bytes()[:100])


def mismatched(issued: Issued, renewed: Issued) -> None:
    issued.cert_file.write_bytes(renewed.cert_file.read_bytes())


def removed(issued: Issued, renewed: Issued) -> None:
    issued.key_file.unlink()


@pytest.mark.parametrize("begin", [half_written, mismatched, removed])
def test_amid_a_rotation_the_old_pair_stays_in_force_and_that_is_said_once(
    authority: Authority, caplog: pytest.LogCaptureFixture, begin: Callable[[Issued, Issued], None]
) -> None:
    issued, renewed = authority.issue("member"), authority.issue("renewed")
    certificates, client = authority.certificates(issued), authority.certificates(authority.issue("client"))
    old = contents(issued)
    begin(issued, renewed)
    for _ in range(3):
        assert serial_shown(certificates, client) == issued.serial
        assert fetched(certificates) == old
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the certificate that was read before stays in force" in record.message
    assert "PRIVATE KEY" not in caplog.text
    issued.replace(renewed)
    assert serial_shown(certificates, client) == renewed.serial
    mismatched(issued, authority.issue("third"))
    assert serial_shown(certificates, client) == renewed.serial
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


def test_a_key_is_never_printed(authority: Authority) -> None:
    pems = authority.certificates(authority.issue("member")).pems()
    assert "PRIVATE" not in repr(pems)
    assert b"PRIVATE" in pems.key


# gRPC


async def test_grpc_shows_a_new_certificate_while_an_old_stream_goes_on(authority: Authority) -> None:
    issued, renewed = authority.issue("server"), authority.issue("renewed")
    client = authority.issue("client")
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    async def echo(requests: object, context: object) -> object:
        async for request in requests:  # type: ignore[attr-defined]
            yield request

    handler = grpc.stream_stream_rpc_method_handler(echo)  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(authority.certificates(issued)))
    await server.start()

    def open_channel(trusted: bytes) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(trusted, client.key_file.read_bytes(), client.cert_file.read_bytes())
        options = [("grpc.ssl_target_name_override", DEFAULT_SERVER_NAME), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)

    async def answer(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> object:
        await call.write(b"?")
        return await call.read()

    old_cert, new_cert = issued.cert_file.read_bytes(), renewed.cert_file.read_bytes()
    async with open_channel(authority.ca_file.read_bytes()) as channel:
        stream = channel.stream_stream("/test/Echo")()
        assert await answer(stream) == b"?"
        issued.replace(renewed)
        shown = await _shown(port, client)
        assert serial_of(shown) == serial_of(new_cert) != serial_of(old_cert)
        assert await answer(stream) == b"?"
        async with open_channel(authority.ca_file.read_bytes()) as other:
            assert await answer(other.stream_stream("/test/Echo")()) == b"?"
        stream.cancel()
    await server.stop(None)


async def _shown(port: int, client: Issued) -> bytes:
    """The certificate that a server shows now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(client.cert_file, client.key_file)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(shown).encode()


FAILED = "failed to connect to all addresses; last error: "


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (
            "UNKNOWN: x: Tls handshake failed: CERTIFICATE_VERIFY_FAILED: certificate has expired: OK",
            "refused: certificate has expired",
        ),
        ("UNKNOWN: x: Hostname Verification Check failed.", "for another name"),
        ("UNKNOWN: x: Tls handshake failed: SSL_ERROR_SSL: WRONG_VERSION_NUMBER: OK", "does not speak TLS"),
        ("UNAVAILABLE: ipv4:127.0.0.1:42345: Socket closed", "refuses this side's certificate, or only one"),
        ("UNAVAILABLE: recvmsg:Connection reset by peer", "refuses this side's certificate, or only one"),
    ],
)
def test_refusals_of_grpc_are_told_in_words(details: str, words: str) -> None:
    assert words in grpc_reason(FAILED + details)


@pytest.mark.parametrize("details", [FAILED + "connect: Connection refused (111)", "Socket closed"])
def test_what_is_no_refusal_is_told_as_it_is(details: str) -> None:
    assert grpc_reason(details) == details
