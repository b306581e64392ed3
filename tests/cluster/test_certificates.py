"""Certificates that are wrong are told before anything starts, with the file, the key and the remedy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from cluster import preflight
from cluster.config import HeadwaterConfig, load
from protos.errors import SetupError
from protos.tls import PeerTLS
from tests.certificates import Authority, Issued

PORTS = ("router.grpc.port=0", "router.metrics.port=0")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def members(issued: Issued, ca_file: Path, *more: str) -> HeadwaterConfig:
    files = {"cert_file": issued.cert_file, "key_file": issued.key_file, "ca_file": ca_file}
    return load(None, [*PORTS, *(f"cluster.tls.{key}={file}" for key, file in files.items()), *more])


def clients(issued: Issued, *more: str) -> HeadwaterConfig:
    files = {"cert_file": issued.cert_file, "key_file": issued.key_file}
    return load(None, [*PORTS, *(f"router.grpc.tls.{key}={file}" for key, file in files.items()), *more])


def test_what_fits_is_accepted(authority: Authority) -> None:
    issued = authority.issue("member")
    preflight.check(members(issued, authority.ca_file))
    preflight.check(clients(issued, f"router.grpc.tls.client_ca_file={authority.ca_file}"))
    named = authority.issue("named", host="members.example")
    preflight.check(members(named, authority.ca_file, "cluster.tls.server_name=members.example"))


@pytest.mark.parametrize(("make", "section"), [(members, "cluster.tls"), (clients, "router.grpc.tls")])
def test_one_that_has_expired_is_told_with_its_date(authority: Authority, make: object, section: str) -> None:
    issued = authority.issue("old", ends=datetime(2024, 2, 29, 12, 30, tzinfo=UTC))
    config = members(issued, authority.ca_file) if make is members else clients(issued)
    with pytest.raises(SetupError, match=rf"`{section}\.cert_file`: .*old\.pem expired on 2024-02-29 at 12:30 UTC"):
        preflight.check(config)


def test_one_that_is_not_valid_yet_is_told(authority: Authority) -> None:
    issued = authority.issue("new", ends=datetime.now(UTC) + timedelta(days=30))
    with pytest.raises(SetupError, match=r"new\.pem is not valid before .* UTC; set this machine's clock"):
        preflight.check(members(issued, authority.ca_file))


@pytest.mark.parametrize("kind", ["cert_file", "key_file", "ca_file"])
def test_a_file_that_is_missing_is_named(authority: Authority, tmp_path: Path, kind: str) -> None:
    config = members(authority.issue("member"), authority.ca_file, f"cluster.tls.{kind}={tmp_path / 'no.pem'}")
    with pytest.raises(SetupError, match=rf"`cluster\.tls\.{kind}`: .*no\.pem cannot be read"):
        preflight.check(config)


@pytest.mark.parametrize("section", ["cluster.tls", "router.grpc.tls"])
def test_a_key_of_another_certificate_is_named(authority: Authority, section: str) -> None:
    issued, other = authority.issue("member"), authority.issue("other")
    more = f"{section}.key_file={other.key_file}"
    config = members(issued, authority.ca_file, more) if section == "cluster.tls" else clients(issued, more)
    with pytest.raises(SetupError, match=rf"`{section}\.key_file`: .*other\.key is not the key of .*member\.pem"):
        preflight.check(config)


def test_members_that_would_refuse_each_other_are_told_why(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority(tmp_path / "foreign").issue("member")
    with pytest.raises(SetupError, match=r"members would refuse .*\(unable to get local issuer certificate\)"):
        preflight.check(members(foreign, authority.ca_file))
    elsewhere = authority.issue("elsewhere", host="elsewhere.internal")
    with pytest.raises(SetupError, match=r"Hostname mismatch.*with the DNS name headwater\.internal"):
        preflight.check(members(elsewhere, authority.ca_file))


def test_a_key_that_grpc_does_not_take_is_refused(authority: Authority) -> None:
    issued = authority.issue("odd", key=ed25519.Ed25519PrivateKey.generate())
    for config in (members(issued, authority.ca_file), clients(issued)):
        with pytest.raises(SetupError, match=r"odd\.pem has a key that gRPC does not take \(Ed25519"):
            preflight.check(config)


def test_a_name_that_nobody_can_have_is_refused(authority: Authority) -> None:
    with pytest.raises(SetupError, match=r"with the DNS name \.internal"):
        preflight.check(members(authority.issue("member"), authority.ca_file, "cluster.tls.server_name=.internal"))


def test_an_authority_that_is_on_its_way_out_may_have_expired(authority: Authority, tmp_path: Path) -> None:
    issued, old = authority.issue("member"), authority.expired("old authority")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(old.cert_file.read_bytes() + authority.ca_file.read_bytes())
    preflight.check(members(issued, bundle))
    with pytest.raises(SetupError, match=r"`cluster\.tls\.ca_file`: .* expired on"):
        preflight.check(members(issued, old.cert_file))


def test_processes_get_paths_that_hold_in_any_directory(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.issue("member")
    monkeypatch.chdir(tmp_path)
    relative = Issued(Path("authority/member.pem"), Path("authority/member.key"), 0)
    tls = members(relative, Path("authority/ca.pem")).cluster.tls
    assert tls is not None
    folder = tmp_path / "authority"
    assert tls.peer_tls == PeerTLS(folder / "member.pem", folder / "member.key", folder / "ca.pem")
