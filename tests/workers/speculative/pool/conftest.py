"""Channels in plain text and in TLS: what holds for the one holds for the other."""

from __future__ import annotations

import pytest

from protos.tls import Certificates
from tests.certificates import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The one that all members trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def certificates(authority: Authority) -> Certificates:
    """A member's."""
    return authority.certificates(authority.issue("member"))


@pytest.fixture(params=["plain", "tls"])
def secrecy(request: pytest.FixtureRequest, certificates: Certificates) -> Certificates | None:
    """What both ends of the channels have."""
    return certificates if request.param == "tls" else None
