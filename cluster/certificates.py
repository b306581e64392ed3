"""What can be known to be wrong with certificates before Ray is started: pairs, dates, names, authorities.

A cluster whose members refuse each other would come up and serve nothing, so its certificate is tried on itself.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import HeadwaterConfig, PeerTLSSection
from protos.errors import SetupError
from protos.tls import Certificates, ssl_reason
from router.config import TLSSection

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

NUM_FLIGHTS = 4  # messages that a handshake takes at most, back and forth


def check_certificates(config: HeadwaterConfig) -> None:
    """Raises SetupError that names the file, the key of the configuration and the remedy."""
    if config.router.grpc.tls is not None:
        _check_router(config.router.grpc.tls)
    if config.cluster.tls is not None:
        _check_members(config.cluster.tls)


def _check_router(tls: TLSSection) -> None:
    section = "router.grpc.tls"
    Certificates(tls.cert_file, tls.key_file, tls.client_ca_file, section=section, ca_key="client_ca_file")
    _check_dates(f"{section}.cert_file", tls.cert_file)
    _check_kind(f"{section}.cert_file", tls.cert_file)
    if tls.client_ca_file is not None:
        _check_dates(f"{section}.client_ca_file", tls.client_ca_file, is_bundle=True)


def _check_members(tls: PeerTLSSection) -> None:
    certificates = Certificates.of_peer(tls.peer_tls)
    _check_dates("cluster.tls.cert_file", tls.cert_file)
    _check_kind("cluster.tls.cert_file", tls.cert_file)
    _check_dates("cluster.tls.ca_file", tls.ca_file, is_bundle=True)
    try:
        _shake_hands(certificates)
    except (ssl.SSLError, ValueError) as error:  # no TLS can be spoken with some names
        raise SetupError(
            f"`cluster.tls.cert_file`: members would refuse {tls.cert_file} ({ssl_reason(error)}); it must be signed "
            f"by {tls.ca_file}, for servers and clients, with the DNS name {tls.server_name}"
        ) from None


def _check_dates(key: str, file: Path, *, is_bundle: bool = False) -> None:
    """Of a chain the first certificate counts; of a bundle of authorities the one that lasts longest."""
    now, certificates = datetime.now(UTC), _certificates(key, file)
    certificate = max(certificates, key=lambda one: one.not_valid_after_utc) if is_bundle else certificates[0]
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if ends < now:
        raise SetupError(f"`{key}`: {file} expired on {ends:%Y-%m-%d at %H:%M} UTC; put a new certificate there")
    if starts > now:
        raise SetupError(
            f"`{key}`: {file} is not valid before {starts:%Y-%m-%d at %H:%M} UTC; "
            "set this machine's clock, or put another certificate there"
        )


def _check_kind(key: str, file: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    kind = _certificates(key, file)[0].public_key()
    if not isinstance(kind, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise SetupError(
            f"`{key}`: {file} has a key that gRPC does not take ({type(kind).__name__}); make one of RSA or P-256"
        )


def _certificates(key: str, file: Path) -> Sequence[Certificate]:
    from cryptography import x509  # takes a tenth of a second, which only those with certificates should pay

    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except ValueError as error:
        raise SetupError(f"`{key}`: {file} has a certificate that cannot be read ({error})") from None


def _shake_hands(certificates: Certificates) -> None:
    """A member meets itself. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = certificates.connect(to_client, to_server), certificates.accept(to_server, to_client)
    for _ in range(NUM_FLIGHTS):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):  # then the other end goes on
                end.do_handshake()
