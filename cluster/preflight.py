"""What can be known to be wrong before Ray is started: model, certificates and ports. Takes milliseconds."""

from __future__ import annotations

import errno
import socket

from cluster.certificates import check_certificates
from cluster.config import HeadwaterConfig
from protos.errors import ConfigError, SetupError
from workers.model.directory import check_directory


def check(config: HeadwaterConfig) -> None:
    """Raises SetupError with the first thing that would keep a cluster on this machine from starting."""
    check_directory(config.worker.model.path)
    check_certificates(config)
    if not config.cluster.ray.is_local:
        return
    if config.cluster.num_routers > 1 and (config.router.grpc.port or config.router.metrics.port):
        raise ConfigError(
            f"`cluster.num_routers` is {config.cluster.num_routers}: on one machine they cannot share a port; "
            "set it to 1, or router.grpc.port and router.metrics.port to 0"
        )
    _check_port("router.grpc", config.router.grpc.host, config.router.grpc.port)
    _check_port("router.metrics", config.router.metrics.host, config.router.metrics.port)


def _check_port(key: str, host: str, port: int) -> None:
    if port == 0:
        return
    family, kind, protocol, _, address = _resolve(key, host, port)
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SetupError(
                    f"port {port} on {host} is taken, perhaps by another cluster; stop that, or --set {key}.port=0"
                ) from None
            raise SetupError(f"`{key}`: cannot listen on {host}:{port} ({error.strerror})") from None


def _resolve(key: str, host: str, port: int) -> tuple[int, int, int, str, tuple[str | int, ...] | tuple[int, bytes]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"`{key}.host`: {host} is not an address of this machine ({error.strerror})") from None
