"""Ports of this machine that lead to a router in the cluster, through the API server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.kubernetes.api import Api
from protos.errors import KubernetesError

CHUNK_BYTES: Final = 65536
ROUTERS: Final = "app.kubernetes.io/name=headwater,app.kubernetes.io/component=router"
PORTS: Final = {"grpc": 9000, "metrics": 9100}  # where a pod's spec names none


@dataclass(frozen=True, slots=True)
class Router:
    """A router's pod that is ready, and the ports of it by their names."""

    pod: str
    ports: Mapping[str, int]


def ready_router(api: Api, instance: str | None = None) -> Router:
    """One of them. Raises KubernetesError if there is none."""
    selector = ROUTERS + (f",app.kubernetes.io/instance={instance}" if instance else "")
    pods = api.items("v1", "Pod", api.namespace, selector=selector)
    for pod in pods:
        conditions = (pod.get("status") or {}).get("conditions") or ()
        if any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
            listed = [port for container in pod["spec"]["containers"] for port in container.get("ports") or ()]
            named = {port["name"]: port["containerPort"] for port in listed if "name" in port}
            return Router(pod["metadata"]["name"], PORTS | named)
    raise KubernetesError(
        f"none of {len(pods)} router pods in namespace {api.namespace} is ready; see `headwater deploy status`"
    )


class Forwarder:
    """Listens on one local port; each connection is led to the port `name` of a router that is ready then.

    Owns the listener and a thread for each direction of each connection.
    """

    def __init__(
        self, api: Api, name: str, *, local_port: int, instance: str | None, on_error: Callable[[str], None]
    ) -> None:
        self._api = api
        self._name = name
        self._instance = instance
        self._on_error = on_error
        try:
            self._listener = socket.create_server(("127.0.0.1", local_port), reuse_port=False)
        except OSError as error:
            raise KubernetesError(
                f"port {local_port} of this machine cannot be used ({error.strerror}); choose another, or 0 for any"
            ) from None
        threading.Thread(target=self._accept, name=f"forward-{name}", daemon=True).start()

    @property
    def local_port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """No new connections; open ones end with the program."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        """One connection, until either side ends it."""
        with contextlib.closing(near):
            try:
                router = ready_router(self._api, self._instance)
                port = router.ports[self._name]
                tunnel = _tunnel(self._api, router.pod, port)
            except KubernetesError as error:
                self._on_error(error.message)
                return
            with contextlib.closing(tunnel.socket(port)) as far:
                back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                back.start()
                _pump(near, far)
                back.join()
            if fault := tunnel.error(port):
                self._on_error(f"port {port}: {fault}")


def _pump(source: Any, sink: Any) -> None:
    """Until one of them ends; then neither can be used any more."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    for end in (sink, source):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _tunnel(api: Api, pod: str, port: int) -> Any:
    """The `kubernetes` package's, on a client of its own: it exchanges a method of the client while it connects."""
    from kubernetes import client, stream

    with client.ApiClient(api.configuration) as own:
        connect = client.CoreV1Api(own).connect_get_namespaced_pod_portforward
        try:
            return stream.portforward(connect, pod, api.namespace, ports=str(port))
        except client.ApiException as error:
            raise KubernetesError(f"no way to port {port} of pod {pod}: {error.reason}") from None
