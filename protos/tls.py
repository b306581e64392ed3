"""Who is who, by certificates: one set of files for each side, read again whenever a connection begins.

Clients know a router by its certificate; the members of a cluster know each other by certificates of one authority.
Files may be replaced at any time: new connections use what they find, old ones live on. A set that does not fit
together, such as a key that is still the old one, is not taken: what was in force stays so.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos.errors import SetupError

DEFAULT_SERVER_NAME = "headwater.internal"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerTLS:
    """How the members of a cluster show each other who they are: PEM files, the same authority for all.

    Members are reached by addresses that no certificate can foresee, so the name in theirs is always `server_name`.
    """

    cert_file: Path
    key_file: Path
    ca_file: Path
    server_name: str = DEFAULT_SERVER_NAME


@dataclass(frozen=True, slots=True)
class Pems:
    """What the files hold. Without an authority, the other side need not show a certificate."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None = None


@dataclass(frozen=True, slots=True)
class _InForce:
    """One set of files that fits together."""

    pems: Pems
    acceptor: ssl.SSLContext
    connector: ssl.SSLContext


class Certificates:
    """One side's certificate, key and authority, as its files have them now. Safe from any thread."""

    def __init__(
        self,
        cert_file: Path,
        key_file: Path,
        ca_file: Path | None = None,
        *,
        section: str,
        ca_key: str = "ca_file",
        server_name: str = DEFAULT_SERVER_NAME,
    ) -> None:
        """`section`, `ca_key`: where the configuration names the files. Raises SetupError for what cannot be used."""
        self._cert_file, self._key_file, self._ca_file = cert_file, key_file, ca_file
        self._section, self._ca_key = section, ca_key
        self.server_name = server_name
        self._lock = threading.Lock()
        self._trouble = ""  # as it was logged last
        self._in_force = self._load(self._read())

    @classmethod
    def of_peer(cls, tls: PeerTLS) -> Certificates:
        """Of a member of a cluster. Raises SetupError."""
        return cls(tls.cert_file, tls.key_file, tls.ca_file, section="cluster.tls", server_name=tls.server_name)

    def pems(self) -> Pems:
        """For a connection that begins now. The same object until the files change."""
        return self._latest().pems

    def accept(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        """The server's side of a connection that begins now."""
        return self._latest().acceptor.wrap_bio(incoming, outgoing, server_side=True)

    def connect(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        """The client's side of a connection that begins now: the other side must have the name `server_name`."""
        return self._latest().connector.wrap_bio(incoming, outgoing, server_hostname=self.server_name)

    def _latest(self) -> _InForce:
        with self._lock:
            try:
                pems = self._read()
                if pems != self._in_force.pems:
                    self._in_force = self._load(pems)
                    log.info("the certificate of %s is a new one", self._section)
                self._trouble = ""
            except SetupError as error:
                self._complain(error.message)
            return self._in_force

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:  # said once, though it is met at every connection
            log.error("%s; the certificate that was read before stays in force", trouble)
        self._trouble = trouble

    def _read(self) -> Pems:
        return Pems(
            self._content("cert_file", self._cert_file),
            self._content("key_file", self._key_file),
            self._content(self._ca_key, self._ca_file) if self._ca_file else None,
        )

    def _content(self, key: str, file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise SetupError(
                f"`{self._section}.{key}`: {file} cannot be read ({error.strerror}); it must be a PEM file on each node"
            ) from None

    def _load(self, pems: Pems) -> _InForce:
        """Contexts can only be made from files, so these must be the same before and after."""
        made = _InForce(pems, self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT))
        if self._read() != pems:
            raise SetupError(
                f"`{self._section}`: {self._cert_file} and its key changed while they were read; try again"
            )
        return made

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if protocol is ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # every connection shows its certificate
        try:
            context.load_cert_chain(self._cert_file, self._key_file, password="")  # else it would ask the terminal
        except (OSError, ValueError) as error:
            raise SetupError(
                f"`{self._section}.key_file`: {self._key_file} is not the key of {self._cert_file} "
                f"({ssl_reason(error)}); give a PEM certificate and its key without a password"
            ) from None
        if self._ca_file is not None:
            self._trust(context, self._ca_file)
        return context

    def _trust(self, context: ssl.SSLContext, ca_file: Path) -> None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ValueError) as error:
            raise SetupError(
                f"`{self._section}.{self._ca_key}`: {ca_file} is not an authority's certificate ({ssl_reason(error)}); "
                "give a PEM file"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED


class _Fetcher:
    """Called by gRPC before each handshake of one server: the new configuration, or None as long as there is none."""

    def __init__(self, certificates: Certificates, pems: Pems) -> None:
        self._certificates = certificates
        self._pems = pems  # as gRPC knows them

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        pems = self._certificates.pems()
        if pems is self._pems:
            return None
        self._pems = pems
        return _configuration(pems)


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """For a gRPC server: each handshake uses the files of that moment. With an authority, clients must show one."""
    pems = certificates.pems()
    fetcher = _Fetcher(certificates, pems)
    return grpc.dynamic_ssl_server_credentials(_configuration(pems), fetcher, pems.ca is not None)  # type: ignore[arg-type]  # may be None


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """For a gRPC channel that is opened now."""
    pems = certificates.pems()
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)


def channel_options(certificates: Certificates) -> list[tuple[str, str]]:
    """For a gRPC channel to a member: its certificate must have the name of all members."""
    return [("grpc.ssl_target_name_override", certificates.server_name)]


def ssl_reason(error: Exception) -> str:
    """What OpenSSL found wrong, in its own words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error)


def grpc_reason(details: str) -> str:
    """Why a gRPC connection did not come up, in the same words at every attempt; other details as they are."""
    if "failed to connect" not in details:
        return details
    if "Hostname Verification" in details:
        return "the other side's certificate is for another name"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        why = details.rpartition("CERTIFICATE_VERIFY_FAILED:")[2].removesuffix(": OK").strip()
        return f"the other side's certificate is refused: {why}"
    if "WRONG_VERSION_NUMBER" in details:
        return "the other side does not speak TLS"
    if any(words in details for words in ("Socket closed", "Connection reset", "Broken pipe", "handshake")):
        return (
            "the other side hung up at once: it refuses this side's certificate, or only one of the two sides uses TLS"
        )
    return details


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.ca)
