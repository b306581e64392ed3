"""What can be known to be wrong before Ray is started: versions, model, certificates and ports. Takes milliseconds."""

from __future__ import annotations

import errno
import socket

from cluster.certificates import check_certificates
from cluster.config import HeadwaterConfig
from cluster.machine import import_error
from protos.errors import ConfigError, ModelError, SetupError
from workers.model.config import ModelConfig
from workers.model.directory import check_directory, check_foreign_directory
from workers.versions import COMPANIONS, Distributions, Installed, is_suspect, require_vllm


def check(config: HeadwaterConfig) -> None:
    """Raises SetupError with the first thing that would keep a cluster on this machine from starting."""
    if config.worker.engine.kind == "vllm" and config.cluster.ray.is_local:
        check_vllm()
    check_model(config)
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


def check_model(config: HeadwaterConfig) -> ModelConfig | None:
    """The served model's config; None where only vLLM can read it. Raises ModelError for what cannot be loaded."""
    path = config.worker.model.path
    if config.worker.engine.kind != "vllm":
        return check_directory(path)
    check_foreign_directory(path)
    try:
        return ModelConfig.from_directory(path)
    except ModelError:  # of no family that this program knows
        return None


def check_vllm(installed: Distributions | None = None) -> None:
    """Return if vLLM can start with what is installed here. Takes seconds only where a companion looks unfit.

    Raises SetupError with the mismatch and its remedy.
    """
    found = installed or Installed()
    require_vllm(found)
    for name in COMPANIONS:
        if is_suspect(found, name) and (error := import_error(name)):
            raise SetupError(
                f"{name} {found.version(name)} cannot be imported beside torch {found.version('torch')} ({error}), and "
                f"vLLM would try; pip uninstall -y {name}"
            )


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
