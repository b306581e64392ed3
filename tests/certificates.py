"""Certificates made for one test: an authority, what it signs, and what it should not have signed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.tls import DEFAULT_SERVER_NAME, Certificates, PeerTLS

DAY = timedelta(days=1)
_Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key, as files."""

    cert_file: Path
    key_file: Path
    serial: int

    def replace(self, other: Issued) -> None:
        """Put another pair where this one is, as a rotation does."""
        self.cert_file.write_bytes(other.cert_file.read_bytes())
        self.key_file.write_bytes(other.key_file.read_bytes())


class Authority:
    """Signs whatever a test asks for. Its own certificate is in `ca_file`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"authority {folder.name}")
        builder = _builder(self._name, self._name, self._key, ends=datetime.now(UTC) + DAY)
        certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        host: str = DEFAULT_SERVER_NAME,
        ip: str = "127.0.0.1",
        ends: datetime | None = None,
        common_name: str = "",
        key: _Key | None = None,
    ) -> Issued:
        """For both sides of a connection; the name is that of the files."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        ends = ends or datetime.now(UTC) + DAY
        builder = _builder(_name(common_name or name), self._name, key, ends=ends)
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(ip))]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False).sign(
            self._key, hashes.SHA256()
        )
        issued = Issued(self._folder / f"{name}.pem", self._folder / f"{name}.key", certificate.serial_number)
        issued.cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        issued.key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return issued

    def expired(self, name: str) -> Issued:
        """One that was good until yesterday."""
        return self.issue(name, ends=datetime.now(UTC) - DAY)

    def peer(self, issued: Issued, *, server_name: str = DEFAULT_SERVER_NAME) -> PeerTLS:
        """A member with this certificate, which trusts this authority."""
        return PeerTLS(issued.cert_file, issued.key_file, self.ca_file, server_name)

    def certificates(self, issued: Issued, *, server_name: str = DEFAULT_SERVER_NAME) -> Certificates:
        """The same, read."""
        return Certificates.of_peer(self.peer(issued, server_name=server_name))


def serial_of(pem: bytes) -> int:
    """The serial number of the first certificate."""
    return x509.load_pem_x509_certificates(pem)[0].serial_number


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, issuer: x509.Name, key: _Key, *, ends: datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(ends - 3 * DAY).not_valid_after(ends)
